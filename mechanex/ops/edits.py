"""A table of edits as the general steer op takes it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .gate import Gate

__all__ = ["StackedEdits"]


class StackedEdits(NamedTuple):
    """K edits ``x ← x + a(w·x + c) · (b + Lᵀ(R x))``, which rows name by their places.

    Attributes:
        bias: b, ``[K, d]``.
        left: L, ``[K, r, d]``, or None for rank 0.
        right: R, ``[K, r, d]``, given exactly when ``left`` is.
        gate: a, w and c of the K edits; None: every gate is open.
    """

    bias: Tensor
    left: Tensor | None = None
    right: Tensor | None = None
    gate: Gate | None = None

    @classmethod
    def of(
        cls,
        bias: Tensor,
        left: Tensor | None,
        right: Tensor | None,
        kinds: Tensor | None,
        weight: Tensor | None,
        offset: Tensor | None,
    ) -> StackedEdits:
        """The table of the :attr:`tensors` of one."""
        if kinds is None or weight is None or offset is None:
            return cls(bias, left, right)
        return cls(bias, left, right, Gate(kinds, weight, offset))

    @property
    def tensors(
        self,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Bias, left, right and the gate's kinds, weight and offset, as autograd and compilers see them."""
        gate = self.gate
        bare = self.bias, self.left, self.right
        return (*bare, None, None, None) if gate is None else (*bare, gate.kinds, gate.weight, gate.offset)

    @property
    def rank(self) -> int:
        """r; 0 without factors."""
        return 0 if self.left is None else self.left.shape[1]

    def to(self, dtype: torch.dtype) -> StackedEdits:
        """The same edits in another floating dtype."""
        left, right = (None if t is None else t.to(dtype) for t in (self.left, self.right))
        gate = None if self.gate is None else self.gate.to(self.bias.device, dtype)
        return StackedEdits(self.bias.to(dtype), left, right, gate)

    def dtype_for(self, hidden: Tensor, strength: Tensor | None) -> torch.dtype:
        """The dtype of the arithmetic: float64 if any argument is, float32 otherwise."""
        double = any(t is not None and t.dtype is torch.float64 for t in (hidden, strength, *self.tensors))
        return torch.float64 if double else torch.float32
