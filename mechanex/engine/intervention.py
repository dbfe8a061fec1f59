"""What is done to one row of the residual stream: ``x + a(w·x + c)·(b + LᵀRx)``, or ``Mx`` for a dense matrix."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .._private.torch import writes
from ..backends import direct_steer
from ..errors import ValidationError
from ..ops.edits import StackedEdits
from ..ops.gate import NORM, Gate, openings, with_norm_of
from ..ops.steer import steer
from .given import as_table, as_vector

__all__ = ["Edit", "EditTable", "composed", "compute_dtype"]

_PARALLEL = 1e-4  # sine of the angle below which two directions span no plane


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that edits are computed in: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def widest(device: torch.device) -> torch.dtype:
    """The widest floating dtype that a device has: float64, but float32 on Apple's GPUs."""
    return torch.float32 if device.type == "mps" else torch.float64


def _vector(given: object, name: str) -> Tensor:
    v = as_vector(name, given)
    return v if v.dtype in (torch.float32, torch.float64) else v.float()


def _factor(m: Tensor, width: int, name: str) -> Tensor:
    m = as_table(name, m)
    if m.ndim != 2 or m.shape[1] != width:
        raise ValidationError(f"{name} must have shape [rank, {width}]; got {list(m.shape)}.")
    return m if m.dtype in (torch.float32, torch.float64) else m.float()


def unit(v: Tensor) -> Tensor:
    """v/‖v‖, differentiable through the norm.

    Raises:
        ValidationError: v is the zero vector or not finite, so that it has no direction.
    """
    norm = v.norm()
    if not bool(torch.isfinite(norm)) or bool(norm == 0):
        raise ValidationError(
            f"A direction is needed, but the vector's norm is {float(norm)}; pass a finite vector that isn't zero."
        )
    direction: Tensor = v / norm
    return direction


@dataclass(frozen=True, eq=False)
class Edit:
    """One intervention on rows x of the residual stream.

    ``x + bias + leftᵀ(right x)``, or with a dense ``matrix`` ``x + bias + matrix x``. Both terms are taken
    from the original x; a gate multiplies their sum or keeps x's norm. Tensors may require gradients; they are at least
    float32.

    Args:
        bias: [d_model].
        left: [rank, d_model] or None, rows are factors.
        right: [rank, d_model] or None.
        matrix: [d_model, d_model] or None; excludes ``left`` and ``right``.
        gate: the gate of this one edit, or None: always open.
    """

    bias: Tensor
    left: Tensor | None = None
    right: Tensor | None = None
    matrix: Tensor | None = None
    gate: Gate | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "bias", _vector(self.bias, "bias"))
        if (self.left is None) != (self.right is None):
            raise ValidationError("An edit needs both factors, left and right, or neither; got one of them.")
        if self.left is not None and self.right is not None:
            if self.matrix is not None:
                raise ValidationError(
                    "An edit takes either factors (left, right) or a dense matrix; got both."
                )
            object.__setattr__(self, "left", _factor(self.left, self.width, "left"))
            object.__setattr__(self, "right", _factor(self.right, self.width, "right"))
            if self.left.shape[0] != self.right.shape[0]:
                raise ValidationError(
                    f"left and right must have the same rank; got {self.left.shape[0]} and {self.right.shape[0]}."
                )
        if self.matrix is not None:
            object.__setattr__(self, "matrix", as_table("matrix", self.matrix))
        if self.matrix is not None and tuple(self.matrix.shape) != (self.width, self.width):
            raise ValidationError(
                f"matrix must have shape [{self.width}, {self.width}]; got {list(self.matrix.shape)}."
            )
        if self.gate is not None:
            if tuple(self.gate.weight.shape) != (1, self.width):
                raise ValidationError(
                    f"An edit's gate must have a weight of shape [1, {self.width}]; "
                    f"got {list(self.gate.weight.shape)}."
                )
            if self.gate.weight.dtype not in (torch.float32, torch.float64):
                object.__setattr__(self, "gate", self.gate.to(self.gate.weight.device, torch.float32))

    @property
    def width(self) -> int:
        """d_model."""
        return self.bias.shape[0]

    @property
    def rank(self) -> int:
        """Number of factor rows; 0 for a plain addition and for a dense matrix."""
        return 0 if self.left is None else self.left.shape[0]

    @classmethod
    def add(cls, v: Tensor) -> Edit:
        """x + v."""
        return cls(v)

    @classmethod
    def ablate(cls, v: Tensor) -> Edit:
        """x − (x·v̂)v̂: removes the component along v [d_model]. A zero v is a ValidationError."""
        direction = unit(_vector(v, "v"))[None]
        return cls(torch.zeros_like(direction[0]), -direction, direction)

    @classmethod
    def clamp(cls, v: Tensor, value: float) -> Edit:
        """x − (x·v̂)v̂ + value·v: afterwards the projection on v̂ is value·‖v‖ (arXiv:2411.09003, section 2)."""
        v = _vector(v, "v")
        direction = unit(v)[None]
        return cls(value * v, -direction, direction)

    @classmethod
    def cap(cls, v: Tensor, *, at_most: float | None = None, at_least: float | None = None) -> Edit:
        """Holds the projection x·v̂ on one side of a bound, and leaves x alone where it is there already.

        Args:
            v: [d_model]; its direction alone counts.
            at_most: the largest projection, in the units of x.
            at_least: the smallest one.

        Raises:
            ValidationError: not exactly one bound, or a v without direction.
        """
        direction = unit(_vector(v, "v"))
        if at_most is not None and at_least is None:
            return cls(-direction).gated("relu", direction, -float(at_most))
        if at_least is not None and at_most is None:
            return cls(direction).gated("relu", -direction, float(at_least))
        raise ValidationError(
            f"A cap has one bound, at_most=… or at_least=…; got {at_most!r} and {at_least!r}. For both, make two edits."
        )

    @classmethod
    def rotate(cls, v: Tensor, other: Tensor, degrees: float) -> Edit:
        """Turns x in the plane of two vectors by a fixed angle; what stands outside of the plane, and ‖x‖, stay.

        Args:
            v: [d_model], what a positive angle turns ``other`` to.
            other: [d_model], not parallel to v.
            degrees: the angle.

        Raises:
            ValidationError: one of them is zero, or they are parallel and span no plane.
        """
        second = unit(_vector(v, "v"))
        first = unit(_vector(other, "other").to(second))
        rest = second - (second @ first) * first
        if float(rest.norm()) < _PARALLEL:
            raise ValidationError(
                "The two vectors of a rotation are parallel and span no plane: give two directions."
            )
        plane = torch.stack([first, unit(rest)])
        angle = math.radians(float(degrees))
        turn = plane.new_tensor(
            [[math.cos(angle) - 1, math.sin(angle)], [-math.sin(angle), math.cos(angle) - 1]]
        )
        return cls(torch.zeros_like(second), turn @ plane, plane)

    @classmethod
    def affine(cls, v: Tensor, left: Tensor, right: Tensor) -> Edit:
        """x + v + leftᵀ(right x), with left and right [rank, d_model]."""
        return cls(v, left, right)

    @classmethod
    def dense(cls, v: Tensor, matrix: Tensor) -> Edit:
        """x + v + matrix x, with matrix [d_model, d_model]; a matrix product, much slower than a factored edit."""
        return cls(v, matrix=matrix)

    def gated(self, kind: str, weight: Tensor | None = None, offset: Tensor | float = 0.0) -> Edit:
        """The same edit behind a gate that each row opens: x + a(weight·x + offset)·(bias + Mx).

        Args:
            kind: ``"step"``, ``"sigmoid"``, ``"relu"``, ``"norm"`` (the edited row keeps its norm) or ``"none"``.
            weight: [d_model]; ``norm`` and ``none`` need none.
            offset: one number.

        Raises:
            ValidationError: the kind is unknown, it needs a weight, or the edit has a gate already.
        """
        if self.gate is not None:
            raise ValidationError(
                "This edit has a gate already, and an edit has one; gate the edit without it, or give a row two edits."
            )
        if weight is None:
            if kind in ("step", "sigmoid", "relu"):
                raise ValidationError(
                    f"A {kind} gate needs a weight of shape [{self.width}] to see a row with; got none."
                )
            weight = torch.zeros_like(self.bias)
        return replace(self, gate=Gate.of(kind, _vector(weight, "weight"), offset))

    def scaled(self, strength: float) -> Edit:
        """The same edit with its whole effect multiplied: x + strength·a·(bias + Mx)."""
        return Edit(
            self.bias * strength,
            None if self.left is None else self.left * strength,
            self.right,
            None if self.matrix is None else self.matrix * strength,
            gate=self.gate,
        )

    def then(self, following: Edit) -> Edit:
        """One edit that does this one and then ``following``; ranks add up.

        Raises:
            ValidationError: the widths differ, or one of them has a gate, whose opening the other changes.
        """
        if self.gate is not None or following.gate is not None:
            raise ValidationError(
                "An edit with a gate can't be composed into one with another, whose result the gate depends on: "
                "give the row both, in order (EditTable.of_chains, or rows of shape [..., m])."
            )
        if self.width != following.width:
            raise ValidationError(f"Edits of widths {self.width} and {following.width} can't be composed.")
        if self.matrix is not None or following.matrix is not None:
            first, second = self.as_matrix(), following.as_matrix()
            return Edit(
                self.bias + following.bias + second @ self.bias, matrix=first + second + second @ first
            )
        if following.left is None or following.right is None:
            return Edit(self.bias + following.bias, self.left, self.right)
        left, right = following.left, following.right
        bias = self.bias + following.bias + left.T @ (right @ self.bias)
        if self.left is None or self.right is None:
            return Edit(bias, left, right)
        return Edit(
            bias,
            torch.cat([self.left, left]),
            torch.cat([self.right, right + (right @ self.left.T) @ self.right]),
        )

    def as_matrix(self) -> Tensor:
        """The linear part M as [d_model, d_model]."""
        if self.matrix is not None:
            return self.matrix.to(self.bias.dtype)
        if self.left is None or self.right is None:
            return self.bias.new_zeros(self.width, self.width)
        return self.left.T @ self.right

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The bias and whichever of the others there are, the gate's weight and offset too."""
        gate = () if self.gate is None else (self.gate.weight, self.gate.offset)
        return tuple(t for t in (self.bias, self.left, self.right, self.matrix, *gate) if t is not None)

    @property
    def requires_grad(self) -> bool:
        """Whether gradients flow to one of its tensors."""
        return any(t.requires_grad for t in self.tensors)

    def versions(self) -> tuple[int, ...]:
        """Counts that change when a tensor of the edit is written to."""
        return tuple(writes(t) for t in self.tensors)

    def check_finite(self) -> None:
        """Raises a ValidationError when the edit holds NaN or infinite numbers."""
        if not all(bool(torch.isfinite(t).all()) for t in self.tensors):
            raise ValidationError("The edit holds NaN or infinite numbers; check how its vector was made.")

    def to(self, device: torch.device, dtype: torch.dtype) -> Edit:
        """The same edit on another device and in another floating dtype; itself when nothing changes."""
        if self.bias.device == device and self.bias.dtype == dtype:
            return self
        moved = [None if t is None else t.to(device, dtype) for t in (self.left, self.right, self.matrix)]
        gate = None if self.gate is None else self.gate.to(device, dtype)
        return Edit(self.bias.to(device, dtype), *moved, gate=gate)

    def apply(self, hidden: Tensor) -> Tensor:
        """The edited copy of ``hidden`` [..., d_model], in its dtype; ``hidden`` itself is left alone."""
        return EditTable([self]).apply(hidden)


def composed(chain: Sequence[Edit]) -> list[Edit]:
    """As few edits as do the same one after another: neighbours become one, but for those with a gate."""
    parts: list[Edit] = []
    for edit in chain:
        if parts and parts[-1].gate is None and edit.gate is None:
            parts[-1] = parts[-1].then(edit)
        else:
            parts.append(edit)
    return parts


class EditTable:
    """Edits stacked for the ``steer`` op; factors of lower rank are filled up with zero rows.

    The stack is kept from call to call unless gradients are needed: make a new table when a tensor was written to.

    Args:
        edits: at least one; all of one width. Dense matrices are applied one after another.
    """

    def __init__(self, edits: list[Edit]) -> None:
        self.edits = edits
        self._stacked: StackedEdits | None = None
        self._chains: Tensor | None = None

    @classmethod
    def of_chains(cls, chains: Sequence[Sequence[Edit]]) -> EditTable:
        """A table of which a row names a chain of edits, which run in order.

        Edits that follow each other are composed into one where that is the same; one with a gate stays by itself.

        Args:
            chains: at least one, of at least one edit each.
        """
        edits: list[Edit] = []
        places: list[list[int]] = []
        for chain in chains:
            parts = composed(chain)
            places.append(list(range(len(edits), len(edits) + len(parts))))
            edits += parts
        table = cls(edits)
        longest = max(len(place) for place in places)
        if longest > 1:
            filled = [place + [-1] * (longest - len(place)) for place in places]
            table._chains = torch.tensor(filled, dtype=torch.int32)
        return table

    def _stack(self, hidden: Tensor) -> StackedEdits:
        dtype = compute_dtype(hidden.dtype)
        if self._stacked is not None:
            bias = self._stacked.bias
            if bias.device == hidden.device and bias.dtype == dtype:
                return self._stacked
        edits = [e.to(hidden.device, dtype) for e in self.edits]
        rank = max(e.rank for e in edits)
        bias = edits[0].bias[None] if len(edits) == 1 else torch.stack([e.bias for e in edits])
        left = right = gate = None
        if rank:
            left = torch.stack([_filled(e.left, rank, e.bias) for e in edits])
            right = torch.stack([_filled(e.right, rank, e.bias) for e in edits])
        if any(e.gate is not None for e in edits):
            gate = Gate.stack([e.gate or Gate.of("none", torch.zeros_like(e.bias)) for e in edits])
            gate = gate.to(hidden.device, dtype)
        stacked = StackedEdits(bias, left, right, gate)
        if not any(e.requires_grad for e in self.edits):
            self._stacked = stacked
        return stacked

    def apply(self, hidden: Tensor, rows: Tensor | None = None, strength: Tensor | None = None) -> Tensor:
        """Edits ``hidden`` [..., d_model] out of place.

        Args:
            hidden: the residual stream.
            rows: int32 of hidden's leading shape, the edit of every row or -1, or [..., m], its edits in order; None
                applies the only edit to all.
            strength: floating point of rows' shape (without rows: of hidden's leading shape), what multiplies each
                row's edit; None: 1.
        """
        width = self.edits[0].width
        if hidden.shape[-1] != width:
            raise ValidationError(
                f"The edit is for a residual stream {width} wide, but this one is {hidden.shape[-1]} wide; "
                "the vector was made for another model."
            )
        # Whoever lays out rows knows where the model takes its tokens, not where this layer is.
        rows = None if rows is None else rows.to(hidden.device)
        strength = None if strength is None else strength.to(hidden.device)
        if self._chains is not None:
            if strength is not None:
                raise ValidationError(
                    "A table of chains takes no strengths: give the edits' own rows instead."
                )
            self._chains = chains = self._chains.to(hidden.device)
            if rows is None:
                rows = chains[0].expand(*hidden.shape[:-1], -1)
            else:
                rows = torch.where((rows >= 0)[..., None], chains[rows.clamp(min=0)], -1)
        if any(e.matrix is not None for e in self.edits):
            return self._apply_dense(hidden, rows, strength)
        table = self._stack(hidden)
        return steer(hidden, rows, table.bias, table.left, table.right, strength=strength, gate=table.gate)

    def bound(self, rows: Tensor | None = None) -> Callable[[Tensor], Tensor]:
        """:meth:`apply` with these rows, for many hidden states of a loop of one's own that nobody differentiates.

        Of the choice of a backend counts what was in force at the first of them.

        Args:
            rows: as for :meth:`apply`.
        """
        direct: Callable[..., Tensor | None] | None = None
        at = bias = left = right = None
        is_simple = self._chains is None and all(e.matrix is None and e.gate is None for e in self.edits)

        def run(hidden: Tensor) -> Tensor:
            # Nothing is looked at first: it gives None for whatever these tables aren't for.
            edited = None if direct is None else direct(hidden, at, bias, left, right, None)
            if edited is None and is_simple and type(hidden) is Tensor:
                edited = anew(hidden)
            return self.apply(hidden.resolve_neg(), rows) if edited is None else edited

        def anew(hidden: Tensor) -> Tensor | None:
            nonlocal direct, at, bias, left, right
            table = self._stack(hidden)
            at = None if rows is None else rows.to(hidden.device)
            bias, left, right = table.bias, table.left, table.right
            direct = direct_steer(None, hidden, at, left)
            return None if direct is None else direct(hidden, at, bias, left, right, None)

        return run

    def _apply_dense(self, hidden: Tensor, rows: Tensor | None, strength: Tensor | None) -> Tensor:
        flat = hidden.reshape(-1, hidden.shape[-1])
        if rows is None:
            rows = torch.zeros(hidden.shape[:-1], dtype=torch.int32, device=hidden.device)
        rows = rows.reshape(flat.shape[0], -1)
        strength = None if strength is None else strength.reshape(rows.shape)
        x = flat.to(compute_dtype(flat.dtype))
        edits = [edit.to(x.device, x.dtype) for edit in self.edits]
        for i in range(rows.shape[1]):
            amount = None if strength is None else strength[:, i].to(x.dtype)
            before = x
            for k, edit in enumerate(edits):
                x = torch.where((rows[:, i] == k)[:, None], _dense(edit, before, amount), x)
        return torch.where((rows == -1).all(1, keepdim=True), flat, x.to(flat.dtype)).view(hidden.shape)


def _dense(edit: Edit, x: Tensor, amount: Tensor | None) -> Tensor:
    """One edit of every row ``[T, d]`` with its matrix as a whole, ``amount`` [T] times."""
    change = edit.bias + x @ edit.as_matrix().T
    kinds = None
    if edit.gate is not None:
        kinds = edit.gate.kinds.expand(x.shape[0])
        opening = openings(kinds, x @ edit.gate.weight[0] + edit.gate.offset)
        amount = opening if amount is None else amount * opening
    y = x + (change if amount is None else change * amount[:, None])
    return y if kinds is None else torch.where((kinds == NORM)[:, None], with_norm_of(x, y), y)


def _filled(factor: Tensor | None, rank: int, like: Tensor) -> Tensor:
    if factor is None:
        return like.new_zeros(rank, like.shape[0])
    missing = rank - factor.shape[0]
    return factor if missing == 0 else torch.cat([factor, factor.new_zeros(missing, factor.shape[1])])
