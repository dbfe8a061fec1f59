"""What scores the behaviors that rows of a batch are watched for, kept for as long as such rows come."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass

import torch

from ..models.adapter import ModelAdapter
from .behavior import Behavior
from .scoring import Scorer

__all__ = ["RowColumns", "Scoring", "Scorings", "scorings_of"]

_KEPT = 64
_FEW = 8  # behaviors that are scored about as fast as one


@dataclass(frozen=True)
class RowColumns:
    """Which of a scorer's columns are those of a row's behaviors.

    Args:
        names: the behaviors'.
        places: their columns.
        thresholds: their thresholds.
    """

    names: tuple[str, ...]
    places: tuple[int, ...]
    thresholds: tuple[float, ...]

    def read(self, values: Sequence[float]) -> tuple[dict[str, float], list[str]]:
        """Of a token's scores, those of the row's behaviors, and the behaviors that they detect."""
        mine = [values[place] for place in self.places]
        detected = [
            n for n, value, most in zip(self.names, mine, self.thresholds, strict=True) if value > most
        ]
        return dict(zip(self.names, mine, strict=True)), detected


class Scoring:
    """Scores of the behaviors that some rows are watched for, and whose they are.

    Args:
        scorer: of all of them, and perhaps of others.
    """

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer
        self._place = {behavior: j for j, behavior in enumerate(scorer.behaviors)}
        self._columns: dict[tuple[Behavior, ...], RowColumns] = {}

    def covers(self, behaviors: Set[Behavior]) -> bool:
        """Whether it scores all of these."""
        return behaviors <= self._place.keys()

    def of(self, behaviors: tuple[Behavior, ...]) -> RowColumns:
        """The columns of a row that is watched for these."""
        if behaviors not in self._columns:
            facts = [(b.name, self._place[b], b.threshold) for b in behaviors]
            self._columns[behaviors] = RowColumns(*zip(*facts, strict=True))
        return self._columns[behaviors]


class Scorings:
    """The latest ones of a model."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[torch.device, tuple[Behavior, ...]], Scoring] = OrderedDict()

    def of(self, behaviors: Iterable[Behavior], device: torch.device) -> Scoring:
        """One that scores some behaviors, and not many others: the same one for many sets of rows.

        Args:
            behaviors: all of one width.
            device: where the activations are.
        """
        wanted = dict.fromkeys(behaviors)  # in an order that processes share
        for key in reversed(self._kept):
            fits = key[0] == device and len(key[1]) <= max(_FEW, 2 * len(wanted))
            if fits and self._kept[key].covers(wanted.keys()):
                self._kept.move_to_end(key)
                return self._kept[key]
        key = device, tuple(wanted)
        self._kept[key] = Scoring(Scorer(key[1], device))
        if len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        return self._kept[key]


def scorings_of(adapter: ModelAdapter) -> Scorings:
    """Those of a model."""
    if adapter.kept.scorings is None:
        adapter.kept.scorings = Scorings()
    found: Scorings = adapter.kept.scorings
    return found
