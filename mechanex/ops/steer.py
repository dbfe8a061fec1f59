"""The steer op: every edit of the residual stream, ``x ← x + s · a(w·x + c) · (b + Lᵀ(R x))``, many in one call.

One edit a row, of strength 1 and without gates, is the common case and the quick one; the rest is
:mod:`mechanex.ops.steer_many`.

Ways to a backend are those of :mod:`mechanex.ops.ways`. One vector added to every row is a plain torch addition, which
serves all of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mechanex import backends
from mechanex._private.torch import dispatch_modes, jit_is_tracing, transforms_are_active
from mechanex.backends import eager
from mechanex.errors import ValidationError

from . import steer_many
from .dtypes import DTYPE_NAMES, DTYPES
from .edits import StackedEdits
from .gate import Gate
from .ways import PLAIN, way

__all__ = ["Gate", "steer"]


def steer(
    hidden: Tensor,
    rows: Tensor | None,
    bias: Tensor,
    left: Tensor | None = None,
    right: Tensor | None = None,
    *,
    strength: Tensor | None = None,
    gate: Gate | None = None,
    backend: str | None = None,
) -> Tensor:
    """Edit each row t of the residual stream: ``x ← x + s · a(w·x + c) · (b + Lᵀ(R x))``, all of edit ``rows[t]``.

    A row takes up to m edits in order, each of what the former ones made. A row whose indices are all -1 comes back
    bit for bit. Arithmetic is in float32, or float64 if any argument is float64, and the result is rounded once.
    Gradients of any order exist for ``hidden``, ``strength``, ``bias``, ``left``, ``right`` and the gates' weight and
    offset; through a ``step`` gate none flows.

    Args:
        hidden: residual stream, ``[T, d]`` (or ``[..., d]``), floating point; never written to.
        rows: the edit of each row, int32 of shape ``hidden.shape[:-1]``, or its edits, ``[*hidden.shape[:-1], m]``;
            -1 for none. None: every row takes edit 0 of a table of one.
        bias: b, ``[K, d]``.
        left: L, ``[K, r, d]``, or None for edits that only add.
        right: R, ``[K, r, d]``, given exactly when ``left`` is.
        strength: s, floating point of ``rows``' shape (without rows: ``hidden.shape[:-1]``); None: 1. It belongs to the
            row, so that one edit of the table serves every strength.
        gate: a, w and c of the K edits; None: a = 1.
        backend: a registered backend for this call; None: the one in force (:func:`mechanex.backends.use`).

    Returns:
        A new tensor of ``hidden``'s shape and dtype.

    Raises:
        ValidationError: shapes, dtypes or devices don't fit, or (on the CPU) a row index lies outside
            ``[-1, K)``. Other devices don't wait for that check: such rows come back as NaN. No backend reads
            outside the table.
        MechanexError: an explicitly chosen backend can't run here.
    """
    if (
        rows is None
        and left is None
        and right is None
        and strength is None
        and gate is None
        and backend is None
        and backends.prefers_torch()
        and hidden.dtype is bias.dtype
        and hidden.dtype in DTYPES
        and hidden.dim() > 1
        and len(table := bias.shape) == 2
        and table[0] == 1
        and table[1] == hidden.shape[-1]
        and hidden.device == bias.device
    ):
        # One rounding of the float32 sum, as promised: torch adds half types in float32.
        return hidden + bias
    if gate is None and type(hidden) in PLAIN and not torch.compiler.is_compiling():
        direct = backends.direct_steer(backend, hidden, rows, left, strength)
        if direct is not None and _is_plain_call(hidden, bias, left, right, strength):
            edited = direct(hidden, rows, bias, left, right, strength)
            if edited is not None:
                return edited
    _check(hidden, rows, bias, left, right)
    if strength is not None or gate is not None or (rows is not None and rows.dim() == hidden.dim()):
        steer_many.check(hidden, rows, strength, bias, gate)
        if strength is not None or gate is not None or rows is None or rows.shape[-1] != 1:
            edits = StackedEdits(bias, left, right, gate)
            return steer_many.steer(hidden, rows, strength, edits, backend)
        rows = rows.squeeze(-1)
    if hidden.dim() == 2:
        return _dispatch(hidden, rows, bias, left, right, backend)
    flat = hidden.reshape(-1, hidden.shape[-1])
    return _dispatch(flat, None if rows is None else rows.reshape(-1), bias, left, right, backend).view(
        hidden.shape
    )


def _is_plain_call(
    hidden: Tensor, bias: Tensor, left: Tensor | None, right: Tensor | None, strength: Tensor | None
) -> bool:
    """Whether nobody traces, transforms or differentiates this call."""
    if transforms_are_active() or dispatch_modes() or jit_is_tracing():
        return False
    # Spelled out: a loop would cost as much as what it guards. What isn't a tensor is refused later, with words.
    return not torch.is_grad_enabled() or not (
        hidden.requires_grad
        or getattr(bias, "requires_grad", False)
        or getattr(left, "requires_grad", False)
        or getattr(right, "requires_grad", False)
        or getattr(strength, "requires_grad", False)
    )


def _dispatch(
    hidden: Tensor,
    rows: Tensor | None,
    bias: Tensor | None,
    left: Tensor | None,
    right: Tensor | None,
    backend: str | None,
) -> Tensor:
    """Take the way of checked arguments; a bias of None is zero."""
    tensors = (hidden, rows, bias, left, right)
    by = way(tensors)
    if by == "backend":
        if torch.is_grad_enabled() and any(
            t is not None and t.requires_grad for t in (hidden, bias, left, right)
        ):
            edited: Tensor = _SteerFunction.apply(*tensors, backend)  # type: ignore[no-untyped-call]
            return edited
        return backends.kernel("steer", backend, *tensors)(*tensors)
    if by == "torch":
        return eager.steer(*tensors)
    return torch.ops.mechanex.steer(*tensors, backend)  # type: ignore[no-any-return]


def _gradients(
    grad: Tensor,
    hidden: Tensor,
    rows: Tensor | None,
    bias: Tensor | None,
    left: Tensor | None,
    right: Tensor | None,
    backend: str | None,
    needed: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients for hidden, bias, left and right, themselves differentiable."""
    d_hidden = d_bias = d_left = d_right = None
    if needed[0]:
        # The edit's transpose is an edit too: no bias, left and right exchanged.
        d_hidden = grad if left is None else _dispatch(grad, rows, None, right, left, backend)
    if any(needed[1:]) and _is_final(grad, hidden, rows, bias, left, right):
        run = backends.gradients("steer", backend, grad, rows, bias, left, right)
        if run is not None:
            d_bias, d_left, d_right = run(grad, hidden, rows, bias, left, right, needed[1:])
            return d_hidden, d_bias, d_left, d_right
    if needed[1] and bias is not None:
        d_bias = eager.bias_gradient(rows, grad, bias)
    if (needed[2] or needed[3]) and left is not None and right is not None:
        d_left, d_right = eager.table_gradients(hidden, rows, left, right, grad)
    return d_hidden, d_bias, d_left if needed[2] else None, d_right if needed[3] else None


def _is_final(*tensors: Tensor | None) -> bool:
    """Whether nothing will differentiate, trace or transform what is computed of these tensors."""
    return not torch.is_grad_enabled() and way(tensors) == "backend"


@torch.library.custom_op("mechanex::steer", mutates_args=())
def _run(
    hidden: Tensor,
    rows: Tensor | None,
    bias: Tensor | None,
    left: Tensor | None,
    right: Tensor | None,
    backend: str | None,
) -> Tensor:
    return backends.kernel("steer", backend, hidden, rows, bias, left, right)(hidden, rows, bias, left, right)


@_run.register_fake
def _(hidden: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(hidden, memory_format=torch.contiguous_format)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor | None) -> None:
    hidden, rows, bias, left, right, ctx.backend = inputs
    ctx.save_for_backward(hidden if left is not None else None, rows, bias, left, right)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    hidden, rows, bias, left, right = ctx.saved_tensors
    need = ctx.needs_input_grad
    needed = (need[0], need[2], need[3], need[4])
    d_hidden, d_bias, d_left, d_right = _gradients(grad, hidden, rows, bias, left, right, ctx.backend, needed)
    return d_hidden, None, d_bias, d_left, d_right, None


_run.register_autograd(_backward, setup_context=_setup)


class _SteerFunction(torch.autograd.Function):
    """The op for plain tensors that need gradients."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        _setup(ctx, inputs, None)
        *tensors, backend = inputs
        return backends.kernel("steer", backend, *tensors)(*tensors)

    backward = staticmethod(_backward)


def _check(
    hidden: Tensor, rows: Tensor | None, bias: Tensor, left: Tensor | None, right: Tensor | None
) -> None:
    """Raise :class:`ValidationError` unless shapes, dtypes and devices fit; values are not looked at."""
    device = getattr(hidden, "device", None)
    for name, tensor in (("hidden", hidden), ("bias", bias), ("left", left), ("right", right)):
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise ValidationError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dtype not in DTYPES:
            raise ValidationError(
                f"{name} must be floating point, got {tensor.dtype}: convert it to {DTYPE_NAMES}"
            )
        if tensor.device != device:
            raise ValidationError(f"{name} is on {tensor.device}, hidden on {device}: move one of them")
    shape, table = hidden.shape, bias.shape
    if not shape:
        raise ValidationError("hidden must have shape [T, d], got a scalar")
    width = shape[-1]
    if len(table) != 2 or table[1] != width:
        raise ValidationError(f"bias must have shape [K, {width}] (hidden's width), got {list(table)}")
    if (left is None) != (right is None):
        raise ValidationError("left and right go together: give both (rank 1 and up) or neither")
    if left is not None and right is not None:
        factors = left.shape
        if len(factors) != 3 or factors[0] != table[0] or factors[2] != width:
            raise ValidationError(
                f"left must have shape [K, r, d] = [{table[0]}, r, {width}], got {list(factors)}"
            )
        if right.shape != factors:
            raise ValidationError(f"right must have left's shape {list(factors)}, got {list(right.shape)}")
    if rows is None:
        if table[0] != 1:
            raise ValidationError(f"without rows the table must hold one edit, got {table[0]}: give rows")
        return
    if not isinstance(rows, Tensor) or rows.dtype != torch.int32:
        got = rows.dtype if isinstance(rows, Tensor) else type(rows).__name__
        raise ValidationError(f"rows must be an int32 tensor, got {got}: use rows.to(torch.int32)")
    tokens, named = shape[:-1], rows.shape
    if named != tokens and named[:-1] != tokens:
        raise ValidationError(
            f"rows must have shape {list(tokens)}, or {list(tokens)} and m edits, got {list(named)}"
        )
    if rows.device != device:
        raise ValidationError(f"rows is on {rows.device}, hidden on {device}: move one of them")
