"""Steering inside a static step: tables that edits are copied into, and which row takes which, in tensors that stay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy
import torch
from torch import Tensor

from ..intervention import Edit, EditTable, composed, compute_dtype
from ..steer_table import SteerTable
from .steering import Span, meeting

__all__ = ["SlotSteering"]

_FEWEST = 8  # slots of a table


class _Layer:
    """A layer's table of edits, and for each row the slots of its edits in order.

    Args:
        table: where edits are written.
        edits: of a row, at most.
        rows: of the batch, at most.
        device: of the model.
    """

    def __init__(self, table: SteerTable, edits: int, rows: int, device: torch.device) -> None:
        self.table, self.most_edits, self.rows = table, edits, rows
        self.index = torch.full((rows, edits), -1, dtype=torch.int32, device=device)
        self._known = numpy.full((rows, edits), -1, dtype=numpy.int32)
        self._held: list[tuple[Edit, tuple[int, ...]] | None] = [None] * table.slots

    def fits(self, parts: Sequence[Edit], edits: int, rows: int) -> bool:
        """Whether these edits have room, so many a row, for so many rows."""
        table = self.table
        return (
            len(parts) <= table.slots
            and edits <= self.most_edits
            and rows <= self.rows
            and all(part.rank <= table.rank for part in parts)
            and (table.gates or all(part.gate is None for part in parts))
        )

    def write(self, parts: Sequence[Edit]) -> list[int]:
        """Sees to it that each of the edits has a slot; those that are there already are left alone."""
        wanted = [(part, part.versions()) for part in parts]
        held = {id(one[0]): slot for slot, one in enumerate(self._held) if one is not None}
        slots: list[int | None] = []
        for part, versions in wanted:
            slot = held.get(id(part))
            known = slot is not None and self._held[slot] == (part, versions) and _counts(part)
            slots.append(slot if known else None)
        taken = {slot for slot in slots if slot is not None}
        free = (slot for slot in range(self.table.slots) if slot not in taken)
        for i, one in enumerate(wanted):
            if slots[i] is None:
                slot = slots[i] = next(free)
                self._held[slot] = None  # should writing be broken off
                self.table.write(slot, one[0])
                self._held[slot] = one
        return [slot for slot in slots if slot is not None]

    def point(self, index: Any) -> None:
        """Says which slots the rows take: [rows, edits], -1 for none."""
        wanted = numpy.full_like(self._known, -1)
        wanted[: index.shape[0], : index.shape[1]] = index
        if not numpy.array_equal(wanted, self._known):
            sent = torch.from_numpy(wanted)
            # Only CUDA is known to keep pinned memory until its copy is done.
            self.index.copy_(
                sent.pin_memory() if self.index.is_cuda else sent, non_blocking=self.index.is_cuda
            )
            self._known = wanted

    def forget(self) -> None:
        """Lets go of the edits: whatever is wanted next is written anew."""
        self._held = [None] * self.table.slots
        self._known = numpy.full_like(self._known, -2)  # unlike anything wanted

    def apply(self, hidden: Tensor) -> Tensor:
        """The edited copy of ``hidden`` [rows, columns, d_model]."""
        n, columns = hidden.shape[:2]
        index = self.index[:n] if self.most_edits == 1 else self.index[:n, None]
        if columns > 1:
            index = index.expand(n, columns, *index.shape[2:])
        return self.table.apply(hidden, index)


class SlotSteering:
    """The tables of every layer that was ever steered, and who is steered now.

    It keeps nothing of the model, and outlives the decoders that use it.

    Args:
        width: d_model.
        device: the model's.
        dtype: the model's.
    """

    def __init__(self, width: int, device: torch.device, dtype: torch.dtype) -> None:
        self._width, self._device, self._dtype = width, device, compute_dtype(dtype)
        self._layers: dict[int, _Layer] = {}
        self._composed: dict[object, list[Edit]] = {}
        self._dense: dict[int, tuple[EditTable, Tensor]] = {}
        self.active: frozenset[int] = frozenset()
        """The layers at which some row is steered now."""
        self.is_static = True
        """Whether all of that is in tables that stay: a dense matrix is not."""
        self.replaced = 0
        """How many tables gave way to larger ones so far: what was captured before has seen the old ones."""

    @property
    def n_bytes(self) -> int:
        """Memory that the tables take."""
        return sum(layer.table.n_bytes for layer in self._layers.values())

    def prepare(self, spans: Sequence[Span], rows: int) -> None:
        """Copies into place what the next step is.

        Args:
            spans: one per row.
            rows: how many the batch may have.
        """
        wanted = sorted({steer.layer for span in spans for steer in span.steering})
        used: dict[object, list[Edit]] = {}
        active: list[int] = []
        self._dense = {}
        for number in wanted:
            chains, index = meeting(number, spans, 1)
            if not chains:
                continue
            active.append(number)
            if any(edit.matrix is not None for chain in chains for edit in chain):
                self._dense[number] = EditTable.of_chains(chains), torch.from_numpy(index).to(self._device)
                continue
            keys = [(chain, *(edit.versions() for edit in chain)) for chain in chains]
            parts_of = [
                (all(map(_counts, chain)) and self._composed.get(key)) or composed(chain)
                for key, chain in zip(keys, chains, strict=True)
            ]
            used |= zip(keys, parts_of, strict=True)
            parts = list({id(part): part for found in parts_of for part in found}.values())
            most = max(map(len, parts_of))
            layer = self._layer(number, parts, most, rows)
            slot_of = dict(zip(map(id, parts), layer.write(parts), strict=True))
            slots = numpy.full((len(chains) + 1, most), -1, dtype=numpy.int32)  # the last is for -1
            for i, found in enumerate(parts_of):
                slots[i, : len(found)] = [slot_of[id(part)] for part in found]
            layer.point(slots[index[:, 0]])
        for number, layer in self._layers.items():
            if number not in active:
                layer.point(numpy.empty((0, 0), dtype=numpy.int32))
        self._composed = used
        self.active = frozenset(active)
        self.is_static = not self._dense

    def forget(self) -> None:
        """Lets go of the edits, which may be written to before they come again in ways that torch doesn't count."""
        self._composed, self._dense = {}, {}
        self.active, self.is_static = frozenset(), True
        for layer in self._layers.values():
            layer.forget()

    def edit(self, layer: int, hidden: Tensor) -> Tensor:
        """The edited residual stream of a layer at which some row is steered, or was.

        Args:
            layer: which one.
            hidden: [rows, columns, d_model].
        """
        dense = self._dense.get(layer)
        if dense is None:
            return self._layers[layer].apply(hidden)
        table, index = dense
        return table.apply(hidden, index.expand(hidden.shape[:2]))

    def _layer(self, number: int, parts: Sequence[Edit], edits: int, rows: int) -> _Layer:
        known = self._layers.get(number)
        if known is not None and known.fits(parts, edits, rows):
            return known
        old = known.table if known is not None else None
        n_slots = max(_FEWEST, 1 << (len(parts) - 1).bit_length())
        rank = max(part.rank for part in parts)
        table = SteerTable(
            n_slots if old is None else max(n_slots, old.slots),
            self._width,
            rank if old is None else max(rank, old.rank),
            gates=any(part.gate is not None for part in parts) or (old is not None and old.gates),
            device=self._device,
            dtype=self._dtype,
        )
        self.replaced += known is not None
        most = max(edits, 0 if known is None else known.most_edits)
        made = self._layers[number] = _Layer(table, most, rows, self._device)
        return made


def _counts(edit: Edit) -> bool:
    """Whether writes to the edit's tensors are counted."""
    return not any(tensor.is_inference() for tensor in edit.tensors)
