"""Watching answers while they are written: every token scored, and corrected or ended where a behavior shows.

It rides on the decoder: a request names its :class:`Watch` as its onlooker, and :class:`WatchingSteering`, in the place
of the decoder's own, sees it with every call that it prepares.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ...errors import ValidationError
from ..decode.request import Steer
from ..decode.steering import RowSteering, Span
from ..intervention import Edit
from ..models.adapter import Handles, ModelAdapter
from .behavior import Behavior
from .hook_points import HookPoint, check_point, on_point
from .scoring import Scorer

__all__ = ["ACTIONS", "Action", "Seen", "Watch", "WatchingSteering", "check_fits", "forced_edits"]

Action = Literal["correct", "abort", "report"]
ACTIONS: tuple[Action, ...] = ("correct", "abort", "report")
_KEPT_SCORERS = 64


@dataclass(frozen=True)
class Seen:
    """One token of an answer.

    Args:
        scores: by behavior, 0 as in negative examples and 1 as in positive ones on average.
        detected: the behaviors that this token shows.
        corrected: those that were corrected in it.
    """

    scores: dict[str, float]
    detected: tuple[str, ...]
    corrected: tuple[str, ...]


@dataclass(eq=False)
class Watch:
    """What is watched in one answer, and what was seen of it so far; the onlooker of one row.

    Args:
        behaviors: the behaviors.
        action: what is done where one is detected: ``"correct"``: from that token to the answer's end; ``"abort"``: the
            answer ends; ``"report"``: nothing.
        floor: names of behaviors that are corrected whatever the action is, and end no answer.

    Attributes:
        seen: its tokens, in order.
        active: the behaviors that were detected so far.
        altered: whether a token was corrected.
    """

    behaviors: tuple[Behavior, ...]
    action: Action = "correct"
    floor: frozenset[str] = frozenset()
    seen: list[Seen] = field(default_factory=list)
    active: set[str] = field(default_factory=set)
    altered: bool = False
    _counts: dict[HookPoint, int] = field(default_factory=dict)

    @cached_property
    def by_point(self) -> dict[HookPoint, tuple[Behavior, ...]]:
        """The behaviors by the places where they are read."""
        found: dict[HookPoint, tuple[Behavior, ...]] = {}
        for behavior in self.behaviors:
            found[behavior.point] = (*found.get(behavior.point, ()), behavior)
        return found

    @property
    def end(self) -> Literal["behavior"] | None:
        """``"behavior"`` once the answer is to end."""
        return "behavior" if self.action == "abort" and self.active - self.floor else None

    @property
    def detected(self) -> tuple[str, ...]:
        """The behaviors that were detected so far, in the order in which they are watched."""
        return tuple(behavior.name for behavior in self.behaviors if behavior.name in self.active)

    def n_seen(self, point: HookPoint) -> int:
        """Tokens that were scored at a place."""
        return self._counts.get(point, 0)

    def note(self, point: HookPoint, scores: dict[str, float], detected: Sequence[str]) -> tuple[str, ...]:
        """Takes the scores of the next token at a place.

        Returns:
            The behaviors that are to be corrected in it.
        """
        self.active.update(detected)
        to_correct = self.active if self.action == "correct" else self.active & self.floor
        corrected = tuple(name for name in scores if name in to_correct) if to_correct else ()
        self.altered |= bool(corrected)
        place = self._counts[point] = self.n_seen(point) + 1
        if place > len(self.seen):
            self.seen.append(Seen(scores, tuple(detected), corrected))
        else:  # another place of the same token was there before
            one = self.seen[place - 1]
            self.seen[place - 1] = Seen(
                one.scores | scores, (*one.detected, *detected), (*one.corrected, *corrected)
            )
        return corrected


@dataclass(frozen=True)
class _Here:
    """A row with behaviors that are read at one place.

    Args:
        row: of the call.
        watch: what is watched in it.
        behaviors: those that are read here.
        first: which token of the answer stands in the call's first column, negative in the prompt; None for the next.
    """

    row: int
    watch: Watch
    behaviors: tuple[Behavior, ...]
    first: int | None

    def tokens(self, columns: int, point: HookPoint) -> Iterator[tuple[int, int]]:
        """The columns that hold tokens of the answer, and which ones they are."""
        first = self.watch.n_seen(point) if self.first is None else self.first
        return ((column, first + column) for column in range(max(0, -first), columns))


@dataclass(frozen=True)
class _RowColumns:
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


class _Place:
    """What is watched at one place in a call.

    Args:
        rows: the rows with behaviors that are read there.
    """

    def __init__(self, rows: list[_Here]) -> None:
        self.rows = rows
        self.scorer: Scorer | None = None
        self.columns: dict[tuple[Behavior, ...], _RowColumns] = {}

    def repeated(self) -> _Place:
        """The same for calls that repeat this one, each with the next token."""
        return _Place([replace(one, first=None) for one in self.rows])

    def meet(self, scorer_of: Callable[[Sequence[Behavior]], Scorer]) -> Scorer:
        """What scores the rows' behaviors together."""
        if self.scorer is None:
            kinds = {one.behaviors for one in self.rows}
            self.scorer = scorer_of(sorted({b for behaviors in kinds for b in behaviors}, key=id))
            place = {b: j for j, b in enumerate(self.scorer.behaviors)}
            for kind in kinds:
                facts = [(b.name, place[b], b.threshold) for b in kind]
                self.columns[kind] = _RowColumns(*zip(*facts, strict=True))
        return self.scorer


_Places = dict[HookPoint, _Place]


class WatchingSteering(RowSteering):
    """Row-wise steering that also watches the rows whose onlookers are :class:`Watch`.

    Tokens of answers are watched as the model reads them, prompts are not. Where an answer is read again, what was
    corrected in it is corrected again, and what was scored before is not scored.

    Args:
        adapter: the model.
    """

    def __init__(self, adapter: ModelAdapter) -> None:
        super().__init__(adapter)
        self._model = adapter
        self._hooks = Handles()
        self._points: set[HookPoint] = set()
        self._scorers: OrderedDict[tuple[int, ...], Scorer] = OrderedDict()
        self._places: _Places = {}
        self._remembered: _Places = {}

    @property
    def attached(self) -> bool:
        return super().attached or bool(self._points)

    def prepare(self, spans: Sequence[Span], columns: int, key: object = None) -> None:
        edited = set(self._attached)
        super().prepare(spans, columns, key)
        if self._attached != edited:
            # Hooks run in the order in which they came, and scores are of what the edits make.
            self._unhook()
        self.look_on(spans, columns)
        self._remembered = {point: place.repeated() for point, place in self._places.items()}

    def look_on(self, spans: Sequence[Span], columns: int) -> bool:
        rows: dict[HookPoint, list[_Here]] = {}
        for i, span in enumerate(spans):
            watch, first = span.onlooker, span.first - span.prompt_length
            if isinstance(watch, Watch) and first + columns > 0:
                for point, behaviors in watch.by_point.items():
                    rows.setdefault(point, []).append(_Here(i, watch, behaviors, first))
        self._places = {point: _Place(here) for point, here in rows.items()}
        for point in self._places.keys() - self._points:
            self._hooks.add(on_point(self._model, point, self._watching(point)))
            self._points.add(point)
        return bool(self._places)

    def recall(self, key: object) -> bool:
        known = super().recall(key)
        if known:
            self._places = self._remembered
        return known

    def rest(self) -> None:
        super().rest()
        self._places = {}

    def detach(self) -> None:
        super().detach()
        self._unhook()
        self._places = self._remembered = {}

    def _unhook(self) -> None:
        self._hooks.remove()
        self._points.clear()

    def _watching(self, point: HookPoint) -> Any:
        def watch(hidden: Tensor) -> Tensor | None:
            place = self._places.get(point)
            if place is None:
                return None
            begun = time.perf_counter()
            edited = self._watch(hidden, point, place)
            self.seconds += time.perf_counter() - begun
            return edited

        return watch

    def _watch(self, hidden: Tensor, point: HookPoint, place: _Place) -> Tensor | None:
        columns = hidden.shape[1]
        new: list[tuple[int, _Here]] = []
        change: dict[Behavior, list[int]] = {}
        for one in place.rows:
            for column, token in one.tokens(columns, point):
                index = one.row * columns + column
                if token >= one.watch.n_seen(point):
                    new.append((index, one))
                    continue
                for b in one.behaviors:
                    if b.name in one.watch.seen[token].corrected:
                        change.setdefault(b, []).append(index)
        if new:
            self._score(hidden, point, place, new, change)
        if not change:
            return None
        edited = hidden.clone(memory_format=torch.contiguous_format)
        flat = edited.flatten(0, 1)
        for behavior, indices in change.items():
            chosen = torch.tensor(indices, device=hidden.device)
            part = flat.index_select(0, chosen)
            flat.index_copy_(0, chosen, behavior.correction(part.flatten(1)).view_as(part))
        return edited

    def _score(
        self,
        hidden: Tensor,
        point: HookPoint,
        place: _Place,
        new: Sequence[tuple[int, _Here]],
        change: dict[Behavior, list[int]],
    ) -> None:
        """Scores tokens that the model reads for the first time; adds to ``change`` what is to be corrected."""
        scorer = place.meet(lambda behaviors: self._scorer(behaviors, hidden.device))
        x = hidden.flatten(0, 1).flatten(1)
        if len(new) < len(x):
            x = x[torch.tensor([index for index, _ in new], device=x.device)]
        for (index, one), values in zip(new, scorer(x).tolist(), strict=True):
            scores, detected = place.columns[one.behaviors].read(values)
            corrected = one.watch.note(point, scores, detected)
            for b in one.behaviors if corrected else ():
                if b.name in corrected:
                    change.setdefault(b, []).append(index)

    def _scorer(self, behaviors: Sequence[Behavior], device: torch.device) -> Scorer:
        key = tuple(map(id, behaviors))
        if key not in self._scorers:
            self._scorers[key] = Scorer(behaviors, device)
            if len(self._scorers) > _KEPT_SCORERS:
                self._scorers.popitem(last=False)
        self._scorers.move_to_end(key)
        return self._scorers[key]


def check_fits(adapter: ModelAdapter, behavior: Behavior) -> None:
    """Refuses a behavior of another model.

    Raises:
        ValidationError: another family or width, or a layer or a part of it that isn't there.
    """
    if None not in (behavior.family, adapter.family) and behavior.family != adapter.family:
        raise ValidationError(
            f"the behavior {behavior.name!r} was made for {behavior.model}, a model of the family {behavior.family!r}, "
            f"and {adapter.model_id} is of {adapter.family!r}: make it for this model."
        )
    last = adapter.n_layers if behavior.point.kind == "resid" else adapter.n_layers - 1
    wide = behavior.point.kind == "resid" and behavior.width != adapter.d_model
    if wide or behavior.point.layer > last:
        raise ValidationError(
            f"the behavior {behavior.name!r} is read at {behavior.point} of {behavior.model}, {behavior.width} wide, "
            f"and {adapter.model_id} has {adapter.n_layers} layers of width {adapter.d_model}: make it for this model."
        )
    check_point(adapter, behavior.point)


_forced: WeakKeyDictionary[Behavior, Steer] = WeakKeyDictionary()


def forced_edits(behaviors: Sequence[Behavior]) -> tuple[Steer, ...]:
    """Edits that take behaviors out of every token, seen or not: their distance along the correction's direction.

    The same behavior gives the same edit, so that rows share it.

    Raises:
        ValidationError: a behavior that isn't read in the residual stream.
    """
    for behavior in behaviors:
        if behavior.point.kind != "resid":
            raise ValidationError(
                f"the behavior {behavior.name!r} is read at {behavior.point}, and steering is forced on the residual "
                "stream alone."
            )
        if behavior not in _forced:
            found = behavior.correction
            edit = Edit.add(-(found.high - found.low) * found.direction)
            _forced[behavior] = Steer(behavior.point.layer, edit)
    return tuple(_forced[behavior] for behavior in behaviors)
