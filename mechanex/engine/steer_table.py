"""Edits at fixed addresses: a table of static size into which they are copied, for a step that is captured once."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ValidationError
from ..ops.gate import NONE, Gate
from ..ops.steer import steer
from .intervention import Edit

__all__ = ["SteerTable"]


class SteerTable:
    """Room for ``slots`` edits of rank up to ``rank``; which row takes which, and how strongly, is said with each call.

    The tensors are made once and only ever written to, so that a captured graph or compiled code that reads them sees
    every edit written later. A slot starts, and is left by :meth:`clear`, as an edit that changes nothing.

    Args:
        slots: K.
        width: d_model.
        rank: largest rank of an edit; 0: edits only add.
        gates: whether edits may have gates.
        device: where hidden states will be; None: torch's default.
        dtype: float32, or float64 for float64 models.
    """

    def __init__(
        self,
        slots: int,
        width: int,
        rank: int = 0,
        *,
        gates: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if slots < 1 or width < 1 or rank < 0:
            raise ValidationError(
                f"A table needs one slot or more, of width 1 and rank 0 or more; got {slots}, {width} and {rank}."
            )
        self.slots, self.width, self.rank = slots, width, rank
        self._bias = torch.zeros(slots, width, device=device, dtype=dtype)
        factors = torch.zeros(2, slots, rank, width, device=device, dtype=dtype) if rank else (None, None)
        self._left, self._right = factors[0], factors[1]
        self._gate: Gate | None = None
        if gates:
            self._gate = Gate(
                torch.zeros(slots, device=device, dtype=torch.int32),
                torch.zeros(slots, width, device=device, dtype=dtype),
                torch.zeros(slots, device=device, dtype=dtype),
            )

    @torch.no_grad()
    def write(self, slot: int, edit: Edit) -> None:
        """Put ``edit`` into ``slot`` by copying; the device is not waited for.

        Raises:
            ValidationError: the slot doesn't exist, or the edit's width, rank, gate or dense matrix doesn't fit in.
        """
        self._check_slot(slot)
        if edit.width != self.width:
            raise ValidationError(f"The edit is {edit.width} wide, the table {self.width}.")
        if edit.matrix is not None:
            raise ValidationError(
                "A dense matrix doesn't fit into a table of factors: give the edit as left and right, or use EditTable."
            )
        if edit.rank > self.rank:
            raise ValidationError(
                f"The edit has rank {edit.rank}, the table has room for {self.rank}: make it with a higher rank."
            )
        if edit.gate is not None and self._gate is None:
            raise ValidationError("The edit has a gate, but the table was made without: pass gates=True.")
        self._bias[slot].copy_(edit.bias)
        for room, factor in ((self._left, edit.left), (self._right, edit.right)):
            if room is None:
                continue
            if factor is not None:
                room[slot, : edit.rank].copy_(factor)
            room[slot, edit.rank :].zero_()
        if self._gate is not None:
            if edit.gate is None:
                self._gate.kinds[slot].fill_(NONE)
                self._gate.weight[slot].zero_()
                self._gate.offset[slot].zero_()
            else:
                self._gate.kinds[slot].copy_(edit.gate.kinds[0])
                self._gate.weight[slot].copy_(edit.gate.weight[0])
                self._gate.offset[slot].copy_(edit.gate.offset[0])

    def clear(self, slot: int) -> None:
        """Make ``slot`` an edit that changes nothing."""
        self._check_slot(slot)
        self.write(slot, Edit(torch.zeros_like(self._bias[slot])))

    def apply(
        self, hidden: Tensor, rows: Tensor, strength: Tensor | None = None, *, only_adds: bool = False
    ) -> Tensor:
        """Edit ``hidden`` [..., d_model] out of place, without looking at any value on a device.

        Args:
            hidden: the residual stream, on the table's device.
            rows: int32 of hidden's leading shape, or [..., m] for m edits in order; a slot, or -1 for none.
            strength: floating point of rows' shape; None: 1.
            only_adds: whether the caller knows that none of these edits has a rank or a gate, which then aren't read.

        Raises:
            ValidationError: shapes, dtypes or devices don't fit, or (on the CPU) a slot doesn't exist.
        """
        if only_adds:
            return steer(hidden, rows, self._bias, strength=strength)
        return steer(hidden, rows, self._bias, self._left, self._right, strength=strength, gate=self._gate)

    @property
    def gates(self) -> bool:
        """Whether edits may have gates."""
        return self._gate is not None

    @property
    def n_bytes(self) -> int:
        """Memory that the table takes."""
        gate = () if self._gate is None else (self._gate.kinds, self._gate.weight, self._gate.offset)
        return sum(t.nbytes for t in (self._bias, self._left, self._right, *gate) if t is not None)

    def _check_slot(self, slot: int) -> None:
        if not 0 <= slot < self.slots:
            raise ValidationError(f"The table has slots 0 to {self.slots - 1}; got {slot}.")
