"""The general steer op: up to m edits a row in order, with strengths and gates.

Ways to a backend are those of :mod:`mechanex.ops.ways`. Its gradients are those of plain torch on the same arguments,
whichever backend computed the result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mechanex import backends
from mechanex.backends import eager
from mechanex.errors import ValidationError

from .dtypes import DTYPES
from .edits import StackedEdits
from .gate import Gate
from .ways import way

__all__ = ["check", "steer"]


def steer(
    hidden: Tensor, rows: Tensor | None, strength: Tensor | None, edits: StackedEdits, backend: str | None
) -> Tensor:
    """The op for checked arguments, as :func:`mechanex.ops.steer.steer` takes them."""
    n_rows = math.prod(hidden.shape[:-1])  # a width of 0 leaves no -1 to infer
    flat = hidden.reshape(n_rows, hidden.shape[-1])
    many = rows is not None and rows.dim() == hidden.dim()
    n_each = rows.shape[-1] if many and rows is not None else 1
    if n_each == 0:
        return hidden.clone(memory_format=torch.contiguous_format)
    rows = None if rows is None else rows.reshape(n_rows, n_each)
    strength = None if strength is None else strength.reshape(n_rows, n_each)
    return _dispatch(flat, rows, strength, edits, backend).view(hidden.shape)


def check(
    hidden: Tensor, rows: Tensor | None, strength: Tensor | None, bias: Tensor, gate: Gate | None
) -> None:
    """Raise :class:`ValidationError` unless strengths and gates fit arguments that are checked otherwise."""
    if strength is not None:
        shape = hidden.shape[:-1] if rows is None else rows.shape
        if not isinstance(strength, Tensor) or strength.dtype not in DTYPES:
            got = strength.dtype if isinstance(strength, Tensor) else type(strength).__name__
            raise ValidationError(f"strength must be a floating-point tensor, one number an edit, got {got}")
        if strength.shape != shape:
            like = "hidden's rows" if rows is None else "that of rows"
            raise ValidationError(
                f"strength must have shape {list(shape)} ({like}), got {list(strength.shape)}"
            )
        if strength.device != hidden.device:
            raise ValidationError(
                f"strength is on {strength.device}, hidden on {hidden.device}: move one of them"
            )
    if gate is not None:
        if not isinstance(gate, Gate):
            raise ValidationError(f"gate must be a Gate (mechanex.ops.gate), got {type(gate).__name__}")
        if gate.weight.shape != bias.shape:
            raise ValidationError(
                f"gate.weight must have bias' shape {list(bias.shape)}, got {list(gate.weight.shape)}"
            )
        if gate.weight.device != hidden.device:
            raise ValidationError(
                f"gate is on {gate.weight.device}, hidden on {hidden.device}: move one of them"
            )


def _dispatch(
    hidden: Tensor, rows: Tensor | None, strength: Tensor | None, edits: StackedEdits, backend: str | None
) -> Tensor:
    """Take the way of checked arguments; rows and strength are ``[T, m]``, or None."""
    args = (hidden, rows, strength, edits)
    tensors = (hidden, rows, strength, *edits.tensors)
    by = way(tensors)
    if by == "library":
        edited: Tensor = torch.ops.mechanex.steer_many(*tensors, backend)
    elif by == "torch":
        edited = eager.steer_many(*args)
    elif torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        edited = _SteerManyFunction.apply(*tensors, backend)  # type: ignore[no-untyped-call]
    else:
        edited = backends.kernel("steer_many", backend, *args)(*args)
    return edited


@torch.library.custom_op("mechanex::steer_many", mutates_args=())
def _run(
    hidden: Tensor,
    rows: Tensor | None,
    strength: Tensor | None,
    bias: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    kinds: Tensor | None,
    weight: Tensor | None,
    offset: Tensor | None,
    backend: str | None,
) -> Tensor:
    args = (hidden, rows, strength, StackedEdits.of(bias, left, right, kinds, weight, offset))
    return backends.kernel("steer_many", backend, *args)(*args)


@_run.register_fake
def _(hidden: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(hidden, memory_format=torch.contiguous_format)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor | None) -> None:
    ctx.save_for_backward(*inputs[:-1])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *_gradients(grad, ctx.saved_tensors, ctx.needs_input_grad[:-1]), None


_run.register_autograd(_backward, setup_context=_setup)


class _SteerManyFunction(torch.autograd.Function):
    """The op for plain tensors that need gradients."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        _setup(ctx, inputs, None)
        hidden, rows, strength, *edits, backend = inputs
        args = (hidden, rows, strength, StackedEdits.of(*edits))
        return backends.kernel("steer_many", backend, *args)(*args)

    backward = staticmethod(_backward)


def _gradients(
    grad: Tensor, tensors: Sequence[Tensor | None], needed: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients of the op, themselves differentiable where gradients are on.

    Args:
        grad: ``[T, d]``, the output's gradient.
        tensors: the op's nine: hidden, rows, strength, bias, left, right and the gate's kinds, weight and offset.
        needed: for which of them; the others get None.
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views are the nodes to stop at: an argument may stand in two places.
        seen: list[Any] = [
            t.view_as(t) if t is not None and need else t for t, need in zip(tensors, needed, strict=True)
        ]
        hidden, rows, strength, *edits = seen
        out = eager.steer_many_unchecked(hidden, rows, strength, StackedEdits.of(*edits))
        wanted = [t for t, need in zip(seen, needed, strict=True) if need and t is not None]
        found = iter(torch.autograd.grad(out, wanted, grad, create_graph=again, allow_unused=True))
    return tuple(
        next(found) if need and t is not None else None for t, need in zip(seen, needed, strict=True)
    )
