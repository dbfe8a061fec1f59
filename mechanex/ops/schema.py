"""The ops as torch.library knows them: the only schemas, with their fake kernels and gradient formulas.

Compiled and exported code, tensor subclasses and dispatch modes call these; eager code does not, because a
library op costs microseconds a call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mechanex import backends

__all__ = ["completion_logprob", "steer", "steer_many"]


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


@torch.library.custom_op("mechanex::steer_many", mutates_args=())
def _steer_many(
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
    from .steer_many import arguments

    args = arguments(hidden, rows, strength, bias, left, right, kinds, weight, offset)
    return backends.kernel("steer_many", backend, *args)(*args)


@_steer_many.register_fake
def _(hidden: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(hidden, memory_format=torch.contiguous_format)


def _steer_many_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:-1])


def _steer_many_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    from .steer_many import gradients

    return *gradients(grad, ctx.saved_tensors, ctx.needs_input_grad[:-1]), None


_steer_many.register_autograd(_steer_many_backward, setup_context=_steer_many_setup)


def steer_many(
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
    """The library op ``mechanex::steer_many``; for arguments that are checked already, the gate's three apart."""
    edited: Tensor = torch.ops.mechanex.steer_many(
        hidden, rows, strength, bias, left, right, kinds, weight, offset, backend
    )
    return edited


@torch.library.custom_op("mechanex::completion_logprob", mutates_args=())
def _completion_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    coldness: float,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    args = (hidden, weight, target, bias, scale, softcap, coldness)
    logprob, lse = backends.select("completion_logprob", backend, *args).run(*args)
    return logprob, lse


@_completion_logprob.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    coldness: float,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if hidden.dtype is torch.float64 else torch.float32
    return hidden.new_empty(hidden.shape[0], dtype=wide), hidden.new_empty(hidden.shape[0], dtype=wide)


# An op of its own, so that compilers see one call, and a second derivative is an error instead of wrong.
@torch.library.custom_op("mechanex::completion_logprob_backward", mutates_args=())
def _completion_logprob_backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    lse: Tensor,
    scale: float,
    softcap: float | None,
    coldness: float,
    backend: str | None,
) -> Tensor:
    args = (hidden, weight, target, bias, scale, softcap, coldness)
    gradients = backends.select("completion_logprob", backend, *args).gradients
    assert gradients is not None, "every backend of this op has its gradients"
    d_hidden: Tensor = gradients(grad, hidden, weight, target, bias, lse, scale, softcap, coldness)
    return d_hidden


@_completion_logprob_backward.register_fake
def _(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    lse: Tensor,
    scale: float,
    softcap: float | None,
    coldness: float,
    backend: str | None,
) -> Tensor:
    return torch.empty_like(hidden, memory_format=torch.contiguous_format)


def _completion_logprob_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    hidden, weight, target, bias, *ctx.rest = inputs
    ctx.save_for_backward(hidden, weight, target, bias, output[1])
    ctx.mark_non_differentiable(output[1])


def _completion_logprob_gradient(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    d_hidden = torch.ops.mechanex.completion_logprob_backward(grad, *ctx.saved_tensors, *ctx.rest)
    return d_hidden, *(None,) * 7


_completion_logprob.register_autograd(_completion_logprob_gradient, setup_context=_completion_logprob_setup)


def completion_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    coldness: float,
    backend: str | None,
) -> Tensor:
    """The library op ``mechanex::completion_logprob``; for arguments that are checked already."""
    logprob: Tensor = torch.ops.mechanex.completion_logprob(
        hidden, weight, target, bias, scale, softcap, coldness, backend
    )[0]
    return logprob
