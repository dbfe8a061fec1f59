"""Steering the rows of a batch each its own way: one steer op per layer for all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy
import torch
from torch import Tensor

from ...errors import ValidationError
from ..chains import numbered
from ..hooks import attach
from ..intervention import Edit, EditTable
from ..models.adapter import Handles, ModelAdapter, ResidualHook
from ..positions import TokenSelector, check_tokens, selects
from .request import Onlooker, Steer

__all__ = ["RowSteering", "Span", "meeting"]


_Edited = Callable[[Tensor], Tensor]


class Span:
    """Where one row's tokens of a model call stand.

    Args:
        steering: the row's edits.
        prompt_length: tokens of its prompt, for positions that count from the prompt's end.
        first: absolute position of the call's first column for this row; negative where that is padding.
        onlooker: the row's.
    """

    __slots__ = ("first", "onlooker", "prompt_length", "steering")

    def __init__(
        self,
        steering: tuple[Steer, ...],
        prompt_length: int,
        first: int,
        onlooker: Onlooker | None = None,
    ) -> None:
        self.steering, self.prompt_length, self.first = steering, prompt_length, first
        self.onlooker = onlooker

    def selects(self, tokens: TokenSelector, index: Any) -> Any:
        """Whether a selector of tokens selects the row's positions ``index``, an int or an array of them."""
        return selects(tokens, index, lambda: self.prompt_length)

    def edit(self, steer: Steer, at: int) -> Edit | None:
        """What it does to the row's token at this position, or None."""
        if not self.selects(steer.tokens, at):
            return None
        return steer.made() if steer.varying is None else steer.varying.edit(at - (self.prompt_length - 1))

    def spread(self, steer: Steer, at: Any) -> list[tuple[Edit, Any]]:
        """Its edits of the row's tokens at these positions [n], each with a bool array [n] of those that it reaches."""
        reached = self.selects(steer.tokens, at)
        if steer.varying is None:
            return [(steer.made(), reached)]
        return steer.varying.spread(at - (self.prompt_length - 1), reached)


class RowSteering:
    """Attaches to a model and edits its calls row by row; calls that weren't prepared pass unedited.

    Args:
        adapter: the model.
    """

    def __init__(self, adapter: ModelAdapter) -> None:
        self._adapter = adapter
        self._handles = Handles()
        self._attached: set[int] = set()
        self._applied: tuple[object, ...] = ()
        self._current: dict[int, _Edited] = {}
        self._tables: dict[int, tuple[tuple[tuple[Edit, ...], ...], EditTable]] = {}
        self._known: tuple[object, dict[int, _Edited]] | None = None
        self.seconds = 0.0
        """Time spent in edits so far, as the CPU sees it."""

    @property
    def attached(self) -> bool:
        """Whether it has hooks on the model now."""
        return bool(self._attached)

    def check(self, steering: Sequence[Steer]) -> None:
        """Raises a ValidationError for edits that this model has no place for."""
        adapter = self._adapter
        chains: dict[int, list[Edit]] = {}
        for steer in steering:
            if steer.edit.width != adapter.d_model:
                raise ValidationError(
                    f"An edit at layer {steer.layer} is {steer.edit.width} wide, but the residual stream of "
                    f"{adapter.model_id} is {adapter.d_model} wide; the vector was made for another model."
                )
            if steer.layer not in range(adapter.n_layers + 1):
                adapter.layer_index(steer.layer)
                raise ValidationError(f"A request's layers count from 0; got layer {steer.layer}.")
            check_tokens(steer.tokens)
            if steer.condition is not None:
                if steer.condition.width != adapter.d_model:
                    raise ValidationError(
                        f"A condition is {steer.condition.width} wide, but the residual stream of {adapter.model_id} "
                        f"is {adapter.d_model} wide; it was made for another model."
                    )
                adapter.layer_index(steer.condition.layer)
            chains.setdefault(steer.layer, []).append(steer.edit)
        for chain in chains.values():
            EditTable.of_chains([chain])

    def recall(self, key: object) -> bool:
        """Prepares the next model call as the one that was prepared under ``key``; whether that could be."""
        if self._known is None or self._known[0] != key or self._applied != (*self._adapter.kept.applied,):
            return False
        self._current = self._known[1]
        return True

    def prepare(self, spans: Sequence[Span], columns: int, key: object = None) -> None:
        """Says what the next model call, [len(spans), columns], is.

        Args:
            spans: one per row.
            columns: tokens of each row in the call, padding included.
            key: by which calls of the same rows may ``recall`` this one, if no edit of theirs depends on positions.
        """
        begun = time.perf_counter()
        applied = (*self._adapter.kept.applied,)
        if applied != self._applied:  # what is applied to the model edits first, also where it came later
            self.detach()
            self._applied = applied
        layers = sorted({steer.layer for span in spans for steer in span.steering})
        tables = {layer: self._table(layer, spans, columns) for layer in layers}
        self._current = {layer: table for layer, table in tables.items() if table is not None}
        fixed = key is not None and all(s.is_fixed for span in spans for s in span.steering)
        self._known = (key, self._current) if fixed else None
        for layer in layers:
            if layer not in self._attached:
                self._handles.add(attach(self._adapter, [(layer, self._hook(layer))]))
                self._attached.add(layer)
        self.seconds += time.perf_counter() - begun

    def look_on(self, spans: Sequence[Span], columns: int) -> None:
        """Sees to it that the next model call, whose edits somebody else makes, is seen by the rows' onlookers."""

    def foreseen(self, spans: Sequence[Span]) -> Hashable | None:
        """What a step that is captured once has to note for the rows' onlookers, one new token for each row.

        Returns:
            For ``note_down``; (), where nobody looks on; None where onlookers have to be there while the step runs.
        """
        return ()

    def note_down(self, wanted: Hashable) -> None:
        """Sees to it that the next model call notes what ``foreseen`` said is wanted."""

    def noted(self) -> Mapping[Any, Tensor]:
        """What the call after ``note_down`` noted, in tensors that it made."""
        return {}

    def tell(self, spans: Sequence[Span], wanted: Hashable, noted: Mapping[Any, Tensor]) -> bool:
        """Tells the onlookers what was noted as ``wanted``; False where one of them wants the step to run again, in its
        presence."""
        return True

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
            edited = found(hidden)
            self.seconds += time.perf_counter() - begun
            return edited

        return edit

    def _table(self, layer: int, spans: Sequence[Span], columns: int) -> _Edited | None:
        """What edits the call at this layer; None where no token of it is edited."""
        chains, index = meeting(layer, spans, columns)
        if not chains:
            return None
        known = self._tables.get(layer)
        if known is None or known[0] != chains:
            known = self._tables[layer] = (chains, EditTable.of_chains(chains))
        if len(chains) == 1 and bool((index == 0).all()):
            return known[1].bound()
        return known[1].bound(torch.from_numpy(index).to(self._adapter.device))


def meeting(layer: int, spans: Sequence[Span], columns: int) -> tuple[tuple[tuple[Edit, ...], ...], Any]:
    """The chains of edits that meet on some token of a call at this layer, and [rows, columns] int32 which one, or -1.

    Args:
        layer: 0 … n_layers.
        spans: one per row of the call.
        columns: of the call.
    """
    slots: dict[tuple[Edit, ...], int] = {}
    index = numpy.full((len(spans), columns), -1, dtype=numpy.int32)
    for row, span in zip(index, spans, strict=True):
        here = [steer for steer in span.steering if steer.layer == layer]
        begin = max(0, -span.first)
        if all(steer.is_fixed for steer in here):
            if here:
                row[begin:] = slots.setdefault(tuple(steer.made() for steer in here), len(slots))
        elif columns == 1:
            found = [span.edit(steer, span.first) for steer in here]
            chain = tuple(edit for edit in found if edit is not None)
            if chain:
                row[0] = slots.setdefault(chain, len(slots))
        else:
            places = numpy.arange(span.first, span.first + columns)
            spread = [one for steer in here for one in span.spread(steer, places)]
            if spread:
                reached = numpy.stack([tokens for _, tokens in spread], 1)
                row[:] = numbered([edit for edit, _ in spread], reached, slots)
    return tuple(slots), index
