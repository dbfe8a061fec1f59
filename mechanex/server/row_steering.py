"""Steering the rows of a batch each its own way: one steer op per layer for all of them."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy
import torch
from torch import Tensor

from ..engine.hooks import attach
from ..engine.intervention import Edit, EditTable
from ..engine.models.adapter import Handles, ModelAdapter, ResidualHook
from .request import Steer

__all__ = ["RowSteering", "Span", "covers"]

_Chain = tuple[Edit, ...]


class Span:
    """Where one row's tokens of a model call stand.

    Args:
        steering: the row's edits.
        prompt_length: tokens of its prompt, for positions that count from the prompt's end.
        first: absolute position of the call's first column for this row; negative where that is padding.
    """

    __slots__ = ("first", "prompt_length", "steering")

    def __init__(self, steering: tuple[Steer, ...], prompt_length: int, first: int) -> None:
        self.steering, self.prompt_length, self.first = steering, prompt_length, first


def covers(tokens: int | slice | None, position: int, prompt_length: int) -> bool:
    """Whether a token selector covers an absolute position; as :func:`mechanex.engine.positions.token_mask`."""
    if tokens is None:
        return True
    if isinstance(tokens, int):
        return position == (tokens if tokens >= 0 else prompt_length + tokens)
    start = tokens.start or 0
    start = start if start >= 0 else max(prompt_length + start, 0)
    stop = tokens.stop
    if stop is not None and position >= (stop if stop >= 0 else prompt_length + stop):
        return False
    return position >= start and (position - start) % (tokens.step or 1) == 0


class RowSteering:
    """Attaches to a model and edits its calls row by row; calls that weren't prepared pass unedited.

    Args:
        adapter: the model.
    """

    def __init__(self, adapter: ModelAdapter) -> None:
        self._adapter = adapter
        self._handles = Handles()
        self._attached: set[int] = set()
        self._current: dict[int, tuple[EditTable, Tensor]] = {}
        self._tables: dict[int, tuple[tuple[_Chain, ...], EditTable]] = {}
        self._composed: dict[_Chain, Edit] = {}
        self._known: tuple[object, dict[int, tuple[EditTable, Tensor]]] | None = None
        self.seconds = 0.0
        """Time spent in edits so far, as the CPU sees it."""

    def prepare(self, spans: Sequence[Span], columns: int, key: object = None) -> None:
        """Says what the next model call, [len(spans), columns], is.

        Args:
            spans: one per row.
            columns: tokens of each row in the call, padding included.
            key: equal for calls with the same rows; lets a step reuse what the one before worked out.
        """
        fixed = key is not None and not any(steer.tokens is not None for s in spans for steer in s.steering)
        if fixed and self._known is not None and self._known[0] == key:
            self._current = self._known[1]
            return
        begun = time.perf_counter()
        layers = sorted({steer.layer for span in spans for steer in span.steering})
        self._current = {layer: self._table(layer, spans, columns) for layer in layers}
        self._known = (key, self._current) if fixed else None
        for layer in layers:
            if layer not in self._attached:
                self._handles.add(attach(self._adapter, [(layer, self._hook(layer))]))
                self._attached.add(layer)
        self.seconds += time.perf_counter() - begun

    def rest(self) -> None:
        """Ends the prepared call: what the model computes next is left alone."""
        self._current = {}

    def detach(self) -> None:
        """Takes the hooks off the model; they come back with the next prepared call."""
        self._current, self._known = {}, None
        self._handles.remove()
        self._attached.clear()

    def _hook(self, layer: int) -> ResidualHook:
        def edit(hidden: Tensor) -> Tensor | None:
            found = self._current.get(layer)
            if found is None:
                return None
            begun = time.perf_counter()
            edited = found[0].apply(hidden, found[1])
            self.seconds += time.perf_counter() - begun
            return edited

        return edit

    def _table(self, layer: int, spans: Sequence[Span], columns: int) -> tuple[EditTable, Tensor]:
        """The table of the edits that meet at this layer, and [rows, columns] int32 which one, or -1."""
        slots: dict[_Chain, int] = {}
        index = numpy.full((len(spans), columns), -1, dtype=numpy.int32)
        for row, span in zip(index, spans, strict=True):
            here = [steer for steer in span.steering if steer.layer == layer]
            begin = max(0, -span.first)
            if all(steer.tokens is None for steer in here):
                if here:
                    row[begin:] = slots.setdefault(tuple(steer.edit for steer in here), len(slots))
                continue
            for column in range(begin, columns):
                place = span.first + column
                chain = tuple(s.edit for s in here if covers(s.tokens, place, span.prompt_length))
                if chain:
                    row[column] = slots.setdefault(chain, len(slots))
        if not slots:  # nothing here at these positions; a table needs an edit, and no row uses it
            slots[(next(s.edit for span in spans for s in span.steering if s.layer == layer),)] = 0
        chains = tuple(slots)
        known = self._tables.get(layer)
        if known is None or known[0] != chains:
            known = self._tables[layer] = (chains, EditTable([self._compose(chain) for chain in chains]))
        return known[1], torch.from_numpy(index).to(self._adapter.device)

    def _compose(self, chain: _Chain) -> Edit:
        if len(chain) == 1:
            return chain[0]
        found = self._composed.get(chain)
        if found is None:
            found = chain[0]
            for edit in chain[1:]:
                found = found.then(edit)
            if len(self._composed) >= 256:
                self._composed.clear()
            self._composed[chain] = found
        return found
