"""Gates of edits: how far each row opens one, and whether the edited row keeps its norm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mechanex.errors import ValidationError

from .dtypes import DTYPES

__all__ = ["KINDS", "NONE", "NORM", "RELU", "SIGMOID", "STEP", "Gate", "openings", "with_norm_of"]

# A kind's code is its place; compiled kernels know the codes too (csrc/steer.h, kernels/steer_many.py).
KINDS = ("none", "step", "sigmoid", "relu", "norm")
NONE, STEP, SIGMOID, RELU, NORM = range(len(KINDS))


@dataclass(frozen=True, eq=False)
class Gate:
    """The gates of a table of K edits, with ``q = w·x + c`` of the row that an edit finds.

    ``none``: always open (1). ``step``: 1 where q > 0, else 0; no gradient. ``sigmoid``: 1/(1 + e⁻ᵠ). ``relu``:
    max(q, 0), a one-sided cap. ``norm``: open, and the edited row is scaled to the norm that it had (a row that the
    edit makes zero stays zero); w and c are not read.

    Args:
        kinds: codes, places in :data:`KINDS`, int32 ``[K]``; rows under another code come back as NaN.
        weight: w, floating point ``[K, d]``.
        offset: c, floating point ``[K]``.

    Raises:
        ValidationError: shapes, dtypes or devices don't fit together.
    """

    kinds: Tensor
    weight: Tensor
    offset: Tensor

    def __post_init__(self) -> None:
        for name in ("kinds", "weight", "offset"):
            if not isinstance(getattr(self, name), Tensor):
                raise ValidationError(
                    f"gate.{name} must be a tensor, got {type(getattr(self, name)).__name__}"
                )
        if self.kinds.dtype != torch.int32 or self.kinds.dim() != 1:
            raise ValidationError(
                f"gate.kinds must be int32 [K], got {self.kinds.dtype} {list(self.kinds.shape)}"
            )
        n_edits = self.kinds.shape[0]
        if self.weight.dim() != 2 or self.weight.shape[0] != n_edits or self.weight.dtype not in DTYPES:
            raise ValidationError(
                f"gate.weight must be floating point [{n_edits}, d], got {self.weight.dtype} "
                f"{list(self.weight.shape)}"
            )
        if tuple(self.offset.shape) != (n_edits,) or self.offset.dtype not in DTYPES:
            raise ValidationError(
                f"gate.offset must be floating point [{n_edits}], got {self.offset.dtype} "
                f"{list(self.offset.shape)}"
            )
        if not self.kinds.device == self.weight.device == self.offset.device:
            raise ValidationError(
                f"the gate is on {self.kinds.device}, {self.weight.device} and {self.offset.device}: use one device"
            )

    @classmethod
    def of(cls, kind: str, weight: Tensor, offset: Tensor | float = 0.0) -> Gate:
        """The gate of one edit.

        Args:
            kind: one of :data:`KINDS`.
            weight: w ``[d]``.
            offset: c, a number or a tensor that holds one.

        Raises:
            ValidationError: the kind is unknown or the shapes don't fit.
        """
        if kind not in KINDS:
            raise ValidationError(f"a gate is one of {', '.join(KINDS)}; got {kind!r}")
        if not isinstance(weight, Tensor) or weight.dim() != 1:
            got = list(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
            raise ValidationError(f"a gate's weight must be one vector of shape [d]; got {got}")
        if not isinstance(offset, Tensor):
            offset = weight.new_full((), float(offset))
        if offset.numel() != 1:
            raise ValidationError(f"a gate's offset must be one number; got shape {list(offset.shape)}")
        kinds = torch.tensor([KINDS.index(kind)], dtype=torch.int32, device=weight.device)
        return cls(kinds, weight[None], offset.reshape(1))

    @classmethod
    def stack(cls, gates: Sequence[Gate]) -> Gate:
        """The gates of several tables as those of one."""
        return cls(
            torch.cat([g.kinds for g in gates]),
            torch.cat([g.weight for g in gates]),
            torch.cat([g.offset for g in gates]),
        )

    def to(self, device: torch.device, dtype: torch.dtype) -> Gate:
        """The same gates on another device, weight and offset in another dtype."""
        return Gate(self.kinds.to(device), self.weight.to(device, dtype), self.offset.to(device, dtype))


def openings(kinds: Tensor, q: Tensor) -> Tensor:
    """What gates of these kinds ``[T]`` make of ``q`` ``[T]``; NaN for an unknown kind."""
    opening = torch.where((kinds == NONE) | (kinds == NORM), 1.0, torch.full_like(q, float("nan")))
    opening = torch.where(kinds == STEP, (q > 0).to(q.dtype), opening)
    opening = torch.where(kinds == SIGMOID, q.sigmoid(), opening)
    return torch.where(kinds == RELU, q.relu(), opening)


def with_norm_of(x: Tensor, y: Tensor) -> Tensor:
    """Rows of ``y`` scaled to the norms of those of ``x``, both ``[T, d]``; zero rows stay zero."""
    before, after = (torch.linalg.vector_norm(t, dim=1, keepdim=True) for t in (x, y))
    none = after == 0
    return y * torch.where(none, 1.0, before / torch.where(none, 1.0, after))
