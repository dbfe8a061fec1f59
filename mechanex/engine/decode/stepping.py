"""The inputs of decoding steps while the same rows stay: made once, then moved on by one column a step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .calls import StepInputs
from .reading import Numbers
from .row import Row

__all__ = ["Stepping"]

_AHEAD = 64  # columns of the mask that are laid out beyond what is needed now


class Stepping:
    """The next step of these rows, each of which reads its newest token.

    Args:
        rows: the batch's.
        columns: of the cache; the rows are right-aligned in it.
        device: the model's.
        unread: [rows] the newest tokens where the rows don't have them yet, or None.
    """

    def __init__(
        self, rows: Sequence[Row], columns: int, device: torch.device, unread: Tensor | None = None
    ) -> None:
        self._columns = columns
        ahead = int(unread is not None)
        self._lengths = torch.tensor([[row.length + ahead] for row in rows])
        self._mask = self._laid_out(columns + _AHEAD).to(device)
        self._lengths = self._lengths.to(device)
        if unread is None:
            self._ids = torch.tensor([[row.chosen[-1]] for row in rows], device=device)
        else:
            self._ids = unread[:, None]
        self._numbers = Numbers(rows, device)

    def _laid_out(self, width: int) -> Tensor:
        """[rows, width] int64 mask: 0 before a row's first token."""
        begin = self._columns - self._lengths
        return (torch.arange(width, device=begin.device)[None] >= begin).long()

    def inputs(self) -> StepInputs:
        """The next step's call."""
        return StepInputs(
            self._ids,
            self._mask[:, : self._columns + 1],
            self._lengths,
            self._numbers.stated(self._lengths),
        )

    def advance(self, tokens: Tensor) -> None:
        """Moves on behind a step that chose these tokens [rows]."""
        self._columns += 1
        self._ids = tokens[:, None]
        self._lengths = self._lengths + 1
        if self._columns == self._mask.shape[1]:
            self._mask = self._laid_out(self._columns + _AHEAD)
