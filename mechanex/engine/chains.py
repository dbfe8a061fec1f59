"""Chains of edits that meet on one row of the residual stream, as one table for the steer op."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor

from .intervention import Edit, EditTable

__all__ = ["Chain", "ChainTable"]

Chain = tuple[Edit, ...]
"""Edits of one row, in order."""


class ChainTable:
    """Edits rows by one of several chains each.

    Neighbours without a gate are composed into one edit; a gate sees what the edits before it made, so it stays apart.

    Args:
        chains: at least one, none of them empty; all edits of one width.

    Raises:
        ValidationError: the widths differ.
    """

    def __init__(self, chains: Sequence[Chain]) -> None:
        edits: list[Edit] = []
        steps = []
        for chain in chains:
            links = list(_links(chain))
            steps.append(range(len(edits), len(edits) + len(links)))
            edits += links
        self._table = EditTable(edits)
        longest = max(map(len, steps))
        # The last line is for rows without a chain.
        lines = [[*step, *(-1 for _ in range(longest - len(step)))] for step in steps] + [[-1] * longest]
        self._steps: Tensor | None = None
        if longest > 1 or len(edits) > len(chains):
            self._steps = torch.tensor(lines, dtype=torch.int32)

    def apply(self, hidden: Tensor, index: Tensor | None = None) -> Tensor:
        """Edits ``hidden`` [..., d_model] out of place.

        Args:
            hidden: the residual stream.
            index: int32 of hidden's leading shape, the chain of every row or -1; None applies the only chain to all.
        """
        if self._steps is None:
            return self._table.apply(hidden, index)
        if self._steps.device != hidden.device:
            self._steps = self._steps.to(hidden.device)
        if index is None:
            return self._table.apply(hidden, self._steps[0].expand(*hidden.shape[:-1], -1).contiguous())
        return self._table.apply(hidden, self._steps[index.long()])


def _links(chain: Chain) -> Iterator[Edit]:
    """The chain with neighbours that have no gate composed."""
    for gated, edits in groupby(chain, key=lambda edit: edit.gate is not None):
        if gated:
            yield from edits
        else:
            first = next(edits)
            for edit in edits:
                first = first.then(edit)
            yield first
