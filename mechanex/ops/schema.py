"""The ops as torch.library knows them: the only schemas, with their fake kernels and gradient formulas.

Compiled and exported code, tensor subclasses and dispatch modes call these; eager code does not, because a
library op costs microseconds a call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mechanex import backends

__all__ = ["steer"]


@torch.library.custom_op("mechanex::steer", mutates_args=())
def _steer(
    hidden: Tensor,
    rows: Tensor | None,
    bias: Tensor | None,
    left: Tensor | None,
    right: Tensor | None,
    backend: str | None,
) -> Tensor:
    run = backends.kernel("steer", backend, hidden, rows, bias, left, right)
    return run(hidden, rows, bias, left, right)


@_steer.register_fake
def _(
    hidden: Tensor,
    rows: Tensor | None,
    bias: Tensor | None,
    left: Tensor | None,
    right: Tensor | None,
    backend: str | None,
) -> Tensor:
    return torch.empty_like(hidden, memory_format=torch.contiguous_format)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    hidden, rows, bias, left, right, backend = inputs
    ctx.save_for_backward(hidden if left is not None else None, rows, bias, left, right)
    ctx.backend = backend


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    from .steer import _gradients

    hidden, rows, bias, left, right = ctx.saved_tensors
    need = ctx.needs_input_grad
    needed = (need[0], need[2], need[3], need[4])
    d_hidden, d_bias, d_left, d_right = _gradients(grad, hidden, rows, bias, left, right, ctx.backend, needed)
    return d_hidden, None, d_bias, d_left, d_right, None


_steer.register_autograd(_backward, setup_context=_setup)


def steer(
    hidden: Tensor,
    rows: Tensor | None,
    bias: Tensor | None,
    left: Tensor | None,
    right: Tensor | None,
    backend: str | None,
) -> Tensor:
    """The library op ``mechanex::steer``; for arguments that are checked already."""
    return torch.ops.mechanex.steer(hidden, rows, bias, left, right, backend)  # type: ignore[no-any-return]
