"""What conditions on prompts are decided by, gathered while the prompts are read."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from ..hooks import attach
from ..models.adapter import ModelAdapter, ResidualHook
from ..prompt_conditions import PromptCondition, alignment
from .row import Row

__all__ = ["Evidence"]


class Evidence:
    """Sums of the conditions' scores over the tokens of prompts that are read together.

    Args:
        prompts: their rows.
    """

    def __init__(self, prompts: Sequence[Row]) -> None:
        self._asked = [row.undecided for row in prompts]
        self._alone = [len(row.ids) == 1 for row in prompts]
        self._conditions = list(dict.fromkeys(one for asked in self._asked for one in asked))
        self._sums: dict[PromptCondition, Tensor] = {}
        self._counts: Tensor | None = None

    @property
    def wanted(self) -> bool:
        """Whether there is anything to decide."""
        return bool(self._conditions)

    def gathered(self, adapter: ModelAdapter, places: Tensor) -> AbstractContextManager[object]:
        """Runs a block whose call of the model reads tokens of the prompts, and takes what it shows.

        Args:
            adapter: the model.
            places: [prompts, columns] int64, where the call's tokens stand in their prompts; -1 for padding.
        """
        if not self.wanted:
            return nullcontext()
        alone = torch.tensor(self._alone, device=places.device)[:, None]
        counted = (places > 0) | (alone & (places == 0))
        counts = counted.sum(1)
        self._counts = counts if self._counts is None else self._counts + counts

        def watcher(condition: PromptCondition) -> ResidualHook:
            def watch(hidden: Tensor) -> None:
                found = alignment(hidden, condition.weight.to(hidden.device))
                # Rows of padding alone may hold anything.
                part = found.where(counted.to(found.device), 0.0).sum(1)
                before = self._sums.get(condition)
                self._sums[condition] = part if before is None else before + part

            return watch

        return attach(adapter, [(adapter.layer_index(one.layer), watcher(one)) for one in self._conditions])

    def met(self, place: int) -> set[PromptCondition]:
        """The conditions that a prompt meets, now that it was read."""
        assert self._counts is not None
        n = max(int(self._counts[place]), 1)
        return {one for one in self._asked[place] if one.met(float(self._sums[one][place]) / n)}
