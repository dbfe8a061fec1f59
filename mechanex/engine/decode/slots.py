"""A key-value cache whose tensors stay where they are: every row has a slot, and its tokens stand in the first columns.

A step writes one column of each row, at an index that is on the device; what stands behind a row's last token is hidden
by the mask. So a captured CUDA graph that was shown these tensors goes on with whatever rows come later.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..._private.transformers import Cache, DynamicLayer
from .cache import OwnLayer, Unmergeable, kinds

__all__ = ["SlotCache"]


class _Shown:
    """What of the slots the call that runs now sees."""

    def __init__(self) -> None:
        self.rows = self.columns = self.new = 0
        self.index: Tensor | None = None
        """[rows, new] int64, the columns that are written."""


class _SlotLayer(OwnLayer, DynamicLayer):  # type: ignore[no-untyped-call]
    def __init__(self, shown: _Shown, window: int | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._shown = shown
        self.window = window
        self.is_sliding = window is not None

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Writes the call's keys and values [rows, heads, new, width], and gives the columns that it may look at."""
        shown = self._shown
        assert shown.index is not None and self.keys is not None and self.values is not None
        index = shown.index[:, None, :, None]
        for buffer, new in ((self.keys, key_states), (self.values, value_states)):
            buffer[: shown.rows].scatter_(2, index.expand_as(new), new)
        return self.keys[: shown.rows, :, : shown.columns], self.values[: shown.rows, :, : shown.columns]

    def get_seq_length(self) -> int:
        return self._shown.columns - self._shown.new

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._shown.columns, 0

    @property
    def _states(self) -> tuple[Tensor, Tensor]:
        assert self.keys is not None and self.values is not None
        return self.keys, self.values

    def reserve(self, rows: int, columns: int, held: int, like: tuple[Tensor, Tensor]) -> None:
        """Moves to a larger place, with the first ``held`` slots."""
        moved = [one.new_zeros(rows, one.shape[1], columns, one.shape[3]) for one in like]
        if self.is_initialized:
            for old, new in zip(self._states, moved, strict=True):
                kept = min(columns, old.shape[2])
                new[:held, :, :kept] = old[:held, :, :kept]
        self.keys, self.values = moved
        self.is_initialized = True

    def admit(
        self, first: int, source: tuple[Tensor, Tensor], places: Tensor, lengths: Tensor, longest: int
    ) -> None:
        """Fills slots from ``first`` on with rows that are right-aligned in ``source``."""
        m = places.shape[0]
        for buffer, states in zip(self._states, source, strict=True):
            held = states.shape[2]
            # A layer with a window kept the last columns only; those before are never seen again.
            columns = torch.arange(longest, device=states.device) + (held - lengths[:, None])
            columns = columns.clamp(0, held - 1)[:, None, :, None]
            rows = states.index_select(0, places)
            buffer[first : first + m, :, :longest] = rows.gather(
                2, columns.expand(-1, rows.shape[1], -1, rows.shape[3])
            )
            # Masked columns weigh nothing, but nothing times NaN is NaN: whatever was there before is wiped.
            buffer[first : first + m, :, longest:] = 0

    def keep(self, index: Tensor, kept: Tensor) -> None:
        """Copies columns ``kept`` of the first slots over columns ``index``, both [rows] int64."""
        for buffer in self._states:
            rows = torch.arange(index.shape[0], device=buffer.device)
            buffer[rows, :, index.to(buffer.device)] = buffer[rows, :, kept.to(buffer.device)]

    def move(self, source: int, target: int) -> None:
        """Copies a slot over another."""
        for buffer in self._states:
            buffer[target] = buffer[source]


class SlotCache(Cache):
    """The cache of a static step. ``show`` says before a call what of it takes part.

    Args:
        like: a cache of the same model; only its kinds of layers are read.

    Raises:
        Unmergeable: a layer of another kind than transformers' plain and sliding-window ones.
    """

    def __init__(self, like: Cache) -> None:
        self._shown = _Shown()
        super().__init__(layers=[_SlotLayer(self._shown, window) for window in kinds(like)])
        self.n = self.rows = self.columns = 0
        self._begins: list[tuple[int, ...]] = []  # by slot and layer: the first of its tokens that is there

    @property
    def _filled(self) -> list[_SlotLayer]:
        layers: list[Any] = self.layers
        return [layer for layer in layers if layer.is_initialized]

    @property
    def column_bytes(self) -> int:
        """Memory of one column of one row."""
        states = [kept for layer in self._filled for kept in layer._states]
        return sum(kept.shape[1] * kept.shape[3] * kept.element_size() for kept in states)

    @property
    def n_bytes(self) -> int:
        """Memory that it takes."""
        return self.column_bytes * self.rows * self.columns

    def suits(self, other: Cache) -> bool:
        """Whether rows of the other cache can be admitted."""
        ours: list[Any] = self.layers
        theirs: list[Any] = other.layers
        if kinds(self) != kinds(other):
            return False
        for own, new in zip(ours, theirs, strict=True):
            if own.is_initialized and new.is_initialized:
                for a, b in ((own.keys, new.keys), (own.values, new.values)):
                    if (a.dtype, a.device, a.shape[1], a.shape[3]) != (
                        b.dtype,
                        b.device,
                        b.shape[1],
                        b.shape[3],
                    ):
                        return False
            elif self.rows and own.is_initialized != new.is_initialized:
                return False
        return True

    def reserve(self, rows: int, columns: int, like: Cache | None = None) -> None:
        """Makes room for this many rows and columns; what captured graphs have seen of it is void then."""
        layers: list[Any] = self.layers
        sources: list[Any] = self.layers if like is None else like.layers
        for layer, source in zip(layers, sources, strict=True):
            if source.is_initialized:
                if source.keys.ndim != 4 or source.values.ndim != 4:
                    raise Unmergeable("the model's cache isn't [rows, heads, columns, width].")
                layer.reserve(rows, columns, self.n, (source.keys, source.values))
        self.rows, self.columns = rows, columns

    def admit(self, source: Cache, places: Sequence[int], lengths: Sequence[int]) -> None:
        """Adds rows of another cache behind those that are there.

        Args:
            source: a cache of the same model, its rows right-aligned; left alone.
            places: which of its rows.
            lengths: tokens of each.
        """
        longest = max(lengths)
        held: list[int] = []
        layers: list[Any] = self.layers
        sources: list[Any] = source.layers
        for layer, other in zip(layers, sources, strict=True):
            if layer.is_initialized:
                device = other.keys.device
                at = torch.tensor(places, device=device), torch.tensor(lengths, device=device)
                layer.admit(self.n, (other.keys, other.values), *at, longest)
            held.append(other.keys.shape[2] if layer.is_initialized else longest)
        self.n += len(places)
        self._begins += [tuple(max(length - one, 0) for one in held) for length in lengths]

    def drop(self, row: int) -> None:
        """Removes a row; the last one takes its place."""
        self.n -= 1
        last = self._begins.pop()
        if row != self.n:
            self._begins[row] = last
            for layer in self._filled:
                layer.move(self.n, row)

    def clear(self) -> None:
        """Removes all rows."""
        self.n, self._begins = 0, []

    def show(self, rows: int, columns: int, index: Tensor) -> None:
        """Says what the next call sees.

        Args:
            rows: how many slots.
            columns: how many of their columns.
            index: [rows, new] int64, the columns that the call writes.
        """
        shown = self._shown
        shown.rows, shown.columns, shown.index, shown.new = rows, columns, index, index.shape[1]

    def keep(self, index: Tensor, kept: Tensor) -> None:
        """Keeps one of several new columns of each row: column ``kept`` becomes column ``index``.

        Args:
            index, kept: [rows] int64, of the first slots.
        """
        for layer in self._filled:
            layer.keep(index, kept)

    def states_of(self, row: int, n: int) -> tuple[tuple[Tensor, Tensor] | None, ...]:
        """Each layer's keys and values [1, heads, t, width] of a row's first ``n`` tokens, as views; None for a layer
        that holds nothing.

        A layer with a window gives the last t of them where it never had those before.
        """
        layers: list[Any] = self.layers
        at = slice(row, row + 1)
        return tuple(
            (layer.keys[at, :, begin:n], layer.values[at, :, begin:n]) if layer.is_initialized else None
            for layer, begin in zip(layers, self._begins[row], strict=True)
        )
