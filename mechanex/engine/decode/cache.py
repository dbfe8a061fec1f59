"""A key-value cache whose rows come and go: transformers' own cache layers, kept in buffers with room to spare.

Rows are right-aligned: a row's newest token is in the last column, and what stands left of its first token is
padding that the attention mask hides. A step writes one column; nothing is copied until a buffer is full.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..._private.transformers import Cache, DynamicLayer, DynamicSlidingWindowLayer
from ...errors import ValidationError

__all__ = ["OwnLayer", "RollingCache", "Unmergeable", "kinds"]

_SPARE = 64  # columns that a new buffer has beyond what it holds, at least


class Unmergeable(ValidationError):
    """The model keeps something else than keys and values by column, so that rows can't be put together."""


class _Buffer:
    """[rows, heads, columns, width] with a window [:n, :, start:end] in use; what it shows is never stale."""

    def __init__(self) -> None:
        self._data: Tensor | None = None
        self.n = self.start = self.end = 0

    @property
    def view(self) -> Tensor:
        assert self._data is not None
        return self._data[: self.n, :, self.start : self.end]

    def push(self, column: Tensor) -> None:
        """Appends [n, heads, q, width] on the right."""
        self._reserve(column, self.n, 0, column.shape[2])
        assert self._data is not None
        end = self.end + column.shape[2]
        self._data[: self.n, :, self.end : end] = column
        self.end = end

    def admit(self, rows: Tensor) -> None:
        """Adds [m, heads, t, width] below, right-aligned with the rows that are there."""
        more = max(rows.shape[2] - (self.end - self.start), 0)
        self._reserve(rows, self.n + rows.shape[0], more, 0)
        assert self._data is not None
        # Masked columns weigh nothing, but nothing times NaN is NaN: whatever was there before is wiped.
        self._data[: self.n, :, self.start - more : self.start] = 0
        self.start -= more
        there = self._data[self.n : self.n + rows.shape[0], :, self.start : self.end]
        there[:, :, : there.shape[2] - rows.shape[2]] = 0
        there[:, :, there.shape[2] - rows.shape[2] :] = rows
        self.n += rows.shape[0]

    def drop(self, row: int) -> None:
        """Removes a row; the last one takes its place."""
        assert self._data is not None
        self.n -= 1
        if row != self.n:
            self._data[row, :, self.start : self.end] = self._data[self.n, :, self.start : self.end]

    def _reserve(self, like: Tensor, rows: int, left: int, right: int) -> None:
        data, width = self._data, self.end - self.start
        if (
            data is not None
            and rows <= data.shape[0]
            and left <= self.start
            and self.end + right <= data.shape[2]
        ):
            return
        held = 0 if data is None else data.shape[0]
        n_rows = held if rows <= held else max(rows, held + held // 4)
        columns = left + width + max(right, _SPARE, (left + width) // 4)
        moved = like.new_zeros(n_rows, like.shape[1], columns, like.shape[3])
        if data is not None:
            moved[: self.n, :, left : left + width] = data[: self.n, :, self.start : self.end]
        self._data, self.start, self.end = moved, left, left + width


class OwnLayer:
    """A layer of a cache of ours.

    Attributes:
        window: of columns that its tokens see, or None for all.
    """

    window: int | None = None


class _Rolling(OwnLayer):
    """What both kinds of layer share; mixed in before transformers' own class."""

    keys: Tensor | None
    values: Tensor | None
    is_initialized: bool

    def start_empty(self) -> None:
        self._kept = (_Buffer(), _Buffer())

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Appends a step's keys and values [B, heads, q, width] and gives all that the step may look at."""
        keys, values = self._kept
        keys.push(key_states)
        values.push(value_states)
        shown = self._show()
        if self.window is not None and keys.end - keys.start >= self.window:
            for buffer in self._kept:
                buffer.start = buffer.end - (self.window - 1)
            self._show()
        return shown

    def admit(self, source: DynamicLayer, rows: Tensor | None, length: int, columns: int) -> None:
        for buffer, states in zip(self._kept, (source.keys, source.values), strict=True):
            assert states is not None
            chosen = states if rows is None else states.index_select(0, rows.to(states.device))
            buffer.admit(chosen[:, :, -min(columns, chosen.shape[2]) :])
        self.is_initialized = True
        self._show()
        self.lengthen(length)

    def admit_states(self, states: tuple[Tensor, Tensor], gone: int, n: int, length: int) -> None:
        self.is_initialized = True
        begin = 0 if self.window is None else max(n - self.window + 1, 0)
        for buffer, kept in zip(self._kept, states, strict=True):
            buffer.admit(kept[:, :, max(begin - gone, 0) : max(n - gone, 0)])
        self._show()
        self.lengthen(length)

    def drop(self, row: int) -> None:
        for buffer in self._kept:
            buffer.drop(row)
        self._show()

    def trim(self, length: int) -> None:
        for buffer in self._kept:
            buffer.start = max(buffer.start, buffer.end - length)
        self._show()
        self.lengthen(length)

    def lengthen(self, length: int) -> None:
        """Notes the columns that the whole batch has had."""

    def _show(self) -> tuple[Tensor, Tensor]:
        keys, values = self._kept
        self.keys, self.values = shown = keys.view, values.view
        return shown


class _RollingLayer(_Rolling, DynamicLayer):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.start_empty()


class _RollingSlidingLayer(_Rolling, DynamicSlidingWindowLayer):  # type: ignore[no-untyped-call]
    def __init__(self, window: int) -> None:
        super().__init__(sliding_window=window)
        self.window = window
        self.start_empty()

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.cumulative_length += key_states.shape[2]
        return super().update(key_states, value_states)

    def lengthen(self, length: int) -> None:
        self.cumulative_length = length


def kinds(cache: Cache) -> list[int | None]:
    """For each layer of a cache the window of columns that it keeps, or None for all.

    Raises:
        Unmergeable: a layer of another kind than transformers' plain and sliding-window ones, and ours.
    """
    found: list[int | None] = []
    layers: list[Any] = cache.layers
    for layer in layers:
        if type(layer) is DynamicSlidingWindowLayer:
            found.append(int(layer.sliding_window))
        elif isinstance(layer, OwnLayer):
            found.append(layer.window)
        elif type(layer) is DynamicLayer:
            found.append(None)
        else:
            raise Unmergeable(f"the model's cache has layers of the kind {type(layer).__name__}.")
    return found


class RollingCache(Cache):
    """The cache of a batch whose rows come and go. Give it to the model in place of its own cache.

    Args:
        like: a cache of the same model; only its kinds of layers are read.

    Raises:
        Unmergeable: a layer of another kind than transformers' plain and sliding-window ones.
    """

    def __init__(self, like: Cache) -> None:
        layers: list[Any] = [
            _RollingLayer() if window is None else _RollingSlidingLayer(window) for window in kinds(like)
        ]
        super().__init__(layers=layers)

    def admit(
        self, source: Cache, length: int, rows: Sequence[int] | None = None, columns: int | None = None
    ) -> None:
        """Adds rows of another cache below.

        Args:
            source: a cache of the same model, its rows right-aligned; left alone.
            length: columns of the batch once they are in it.
            rows: which of its rows; None for all.
            columns: how many of its last columns matter; None for all.
        """
        chosen = None if rows is None else torch.tensor(list(rows))
        wanted = length if columns is None else columns
        pairs: list[tuple[Any, Any]] = list(zip(self.layers, source.layers, strict=True))
        for own, other in pairs:
            if other.is_initialized:
                if other.keys.ndim != 4 or other.values.ndim != 4:
                    raise Unmergeable("the model's cache isn't [rows, heads, columns, width].")
                own.admit(other, chosen, length, wanted)

    @property
    def column_bytes(self) -> int:
        """Memory of one column of one row."""
        states = [kept for layer in self._filled() for kept in (layer.keys, layer.values)]
        return sum(kept.shape[1] * kept.shape[3] * kept.element_size() for kept in states)

    def states_of(self, row: int, n: int) -> tuple[tuple[Tensor, Tensor] | None, ...] | None:
        """Each layer's keys and values [1, heads, t, width] of a row's ``n`` tokens, as views; None for a layer
        that holds nothing.

        A layer with a window gives the last t of them, those that the next token sees at least. None where a layer has
        let go of those.
        """
        layers: list[Any] = self.layers
        states: list[tuple[Tensor, Tensor] | None] = []
        for layer in layers:
            if not layer.is_initialized:
                states.append(None)
                continue
            held = min(n, layer.keys.shape[2])
            if held < n and (layer.window is None or held < layer.window - 1):
                return None
            row_of, last = slice(row, row + 1), slice(layer.keys.shape[2] - held, None)
            states.append((layer.keys[row_of, :, last], layer.values[row_of, :, last]))
        return tuple(states)

    def admit_states(
        self, states: Sequence[tuple[Tensor, Tensor] | None], total: int, n: int, length: int
    ) -> None:
        """Adds a row below from what ``states_of`` gave.

        Args:
            states: by layer, of the last tokens of ``total`` where they are fewer.
            total: tokens of the text that they are of.
            n: how many of its first tokens.
            length: columns of the batch.
        """
        layers: list[Any] = self.layers
        for layer, pair in zip(layers, states, strict=True):
            if pair is not None:
                layer.admit_states(pair, total - pair[0].shape[2], n, length)

    def drop(self, row: int) -> None:
        """Removes a row; the last row takes its place."""
        for layer in self._filled():
            layer.drop(row)

    def trim(self, length: int) -> None:
        """Forgets all but the last ``length`` columns, once no row is longer."""
        for layer in self._filled():
            layer.trim(length)

    def _filled(self) -> list[Any]:
        layers: list[Any] = self.layers
        return [layer for layer in layers if layer.is_initialized]
