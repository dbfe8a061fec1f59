"""Log-probabilities of given tokens: hidden states times the unembedding, log-softmax, one entry of each row.

The ``[N, V]`` logits are never stored: backends walk the vocabulary in chunks. Ways to a backend are those of
:mod:`mechanex.ops.ways`. Beside the op stand two functions of log-probabilities that keep their digits, and those of
their gradients, where the obvious formulas lose them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mechanex import backends
from mechanex._private.torch import is_batched
from mechanex.backends import eager
from mechanex.errors import MechanexError, ValidationError

from .dtypes import DTYPE_NAMES, DTYPES
from .head import Head
from .ways import way

__all__ = ["completion_logprob", "log1mexp", "log_add_eps"]

# A larger slope's memory, in bytes, becomes the gradient's, so that not both are held. Whoever goes back twice through
# one graph has it computed anew.
SPENT_BYTES = 4 << 20


def completion_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    coldness: float = 1.0,
    *,
    backend: str | None = None,
) -> Tensor:
    """Natural log of the probability that each hidden state gives its target token.

    The logits are ``z = coldness · softcap·tanh(scale·(Wh + bias)/softcap)`` (without softcap: ``coldness · scale·(Wh +
    bias)``), the result ``z[target] − log Σ_v exp z[v]``. Arithmetic after the products is in float32, or float64 for
    float64; log p keeps its relative precision where p comes close to 1, so that ``log1mexp`` of it is right.

    The result is differentiable once, with respect to ``hidden`` alone: the unembedding is frozen. Under ``vmap``,
    ``torch.func`` and forward-mode differentiation plain torch computes the op, and stores every logit.

    Args:
        hidden: final hidden states, ``[N, d]`` (or ``[..., d]``), float32, bfloat16, float16 or float64.
        weight: unembedding, ``[V, d]``, of ``hidden``'s dtype.
        target: token ids, int64 of shape ``hidden.shape[:-1]``.
        bias: ``[V]``, floating point, or None.
        scale: multiplies the products (some models scale their logits).
        softcap: bounds the logits to ``(−softcap, softcap)``, or None.
        coldness: multiplies the finished logits: the inverse of a temperature.
        backend: a registered backend for this call; None: the one in force (:func:`mechanex.backends.use`).

    Returns:
        Log-probabilities of shape ``hidden.shape[:-1]``, float32 (float64 for float64).

    Raises:
        ValidationError: shapes, dtypes, devices or numbers don't fit; ``weight`` or ``bias`` would need a gradient; or
            (on the CPU) a target lies outside ``[0, V)``. Other devices don't wait for that check: such rows are NaN.
        MechanexError: an explicitly chosen backend can't run here.
    """
    _check(hidden, weight, target, bias, scale, softcap, coldness)
    number = None if softcap is None else float(softcap)
    head = Head(weight, bias, float(scale), number, float(coldness))
    if hidden.dim() == 2:
        return _dispatch(hidden, head, target, backend)
    flat = hidden.reshape(-1, hidden.shape[-1])
    return _dispatch(flat, head, target.reshape(-1), backend).view(target.shape)


def _dispatch(hidden: Tensor, head: Head, target: Tensor, backend: str | None) -> Tensor:
    """Take the way of checked arguments."""
    by = way((hidden, head.weight, target, head.bias))
    if by == "library":
        weight, *rest = head
        logprob: Tensor = torch.ops.mechanex.completion_logprob(hidden, weight, target, *rest, backend)[0]
    elif by == "torch":
        logprob = eager.logprobs_of_whole_logits(hidden, head, target)
    elif torch.is_grad_enabled() and hidden.requires_grad:
        logprob = _CompletionLogprob.apply(hidden, head, target, backend)  # type: ignore[no-untyped-call]
    else:
        logprob = backends.select("completion_logprob", backend, hidden, head, target).run(
            hidden, head, target
        )[0]
    return logprob


class _CompletionLogprob(torch.autograd.Function):
    """The op for plain tensors that need gradients."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Head, target: Tensor, backend: str | None) -> Tensor:
        ctx.kernel = backends.select("completion_logprob", backend, hidden, head, target)
        slope = lse = size = None
        result: Tensor
        if ctx.kernel.with_slope is not None:
            result, _, slope, size = ctx.kernel.with_slope(hidden, head, target)
        else:
            result, lse = ctx.kernel.run(hidden, head, target)
        spends = slope is not None and slope.nbytes > SPENT_BYTES
        if spends:
            ctx.slope = slope
        again = (head.weight, head.bias, target, lse) if spends or slope is None else (None,) * 4
        ctx.save_for_backward(hidden, None if spends else slope, size, *again)
        ctx.numbers = head[2:]
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, kept, size, weight, bias, target, lse = ctx.saved_tensors
        with torch.no_grad():
            if size is None:
                d_hidden = ctx.kernel.gradients(grad, hidden, Head(weight, bias, *ctx.numbers), target, lse)
            else:
                # Taken by one call alone, though several threads may go back through the graph at once.
                slope = vars(ctx).pop("slope", None) if kept is None else kept
                if slope is None:
                    slope = ctx.kernel.with_slope(hidden, Head(weight, bias, *ctx.numbers), target)[2]
                factor = (size * grad).unsqueeze(1)
                # Several gradients at once don't fit in one's memory.
                spends = kept is None and not is_batched(grad)
                d_hidden = (slope.mul_(factor) if spends else slope * factor).to(hidden.dtype)
        if torch.is_grad_enabled():
            d_hidden = _Once.apply(d_hidden, grad, hidden)  # type: ignore[no-untyped-call]
        return d_hidden, None, None, None


class _Once(torch.autograd.Function):
    """The first derivative where its graph is kept: that graph lacks what it hangs on, so a second one is refused."""

    @staticmethod
    def forward(ctx: Any, first: Tensor, *_: Tensor) -> Tensor:
        return first.view_as(first)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        raise MechanexError(
            "completion_logprob is differentiable once: for a second derivative use torch.func, or torch.log_softmax "
            "on whole logits"
        )


@torch.library.custom_op("mechanex::completion_logprob", mutates_args=())
def _run(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    coldness: float,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    args = (hidden, Head(weight, bias, scale, softcap, coldness), target)
    logprob, lse = backends.select("completion_logprob", backend, *args).run(*args)
    return logprob, lse


@_run.register_fake
def _(hidden: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if hidden.dtype is torch.float64 else torch.float32
    return hidden.new_empty(hidden.shape[0], dtype=wide), hidden.new_empty(hidden.shape[0], dtype=wide)


# An op of its own, so that compilers see one call, and a second derivative is an error instead of wrong.
@torch.library.custom_op("mechanex::completion_logprob_backward", mutates_args=())
def _run_backward(
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
    args = (hidden, Head(weight, bias, scale, softcap, coldness), target)
    gradients = backends.select("completion_logprob", backend, *args).gradients
    assert gradients is not None, "every backend of this op has its gradients"
    d_hidden: Tensor = gradients(grad, *args, lse)
    return d_hidden


@_run_backward.register_fake
def _(grad: Tensor, hidden: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(hidden, memory_format=torch.contiguous_format)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    hidden, weight, target, bias, *ctx.rest = inputs
    ctx.save_for_backward(hidden, weight, target, bias, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    d_hidden = torch.ops.mechanex.completion_logprob_backward(grad, *ctx.saved_tensors, *ctx.rest)
    return d_hidden, *(None,) * 7


_run.register_autograd(_backward, setup_context=_setup)


def log1mexp(logp: Tensor) -> Tensor:
    """``log(1 − p)`` of ``logp = log p``, right to the last digits for p near 0 and near 1 alike.

    Which of two forms is exact depends on the side of ln 2 (M. Mächler, *Accurately Computing log(1 − exp(−|a|))*,
    2012). The gradient is ``−1/(1/p − 1)``: 0 at p = 0. At p = 1 the value is −inf, and the gradient is taken as 0.

    Args:
        logp: log-probabilities, ``≤ 0``; above 0 the result is NaN.

    Returns:
        A tensor of ``logp``'s shape, float32 (float64 for float64).
    """
    x = _widened(logp, "logp")
    near_one = x > -math.log(2)
    certain = x == 0
    # Each form is only shown values that its gradient can take: an infinity times the mask's 0 would be NaN.
    close = torch.log(-torch.expm1(torch.where(near_one & ~certain, x, -1.0)))
    far = torch.log1p(-torch.exp(torch.where(near_one, -1.0, x)))
    return torch.where(certain, -math.inf, torch.where(near_one, close, far))


def log_add_eps(logp: Tensor, eps: float) -> Tensor:
    """``log(p + eps)`` of ``logp = log p``, computed without leaving log space.

    Args:
        logp: log-probabilities.
        eps: what is added to the probability, ``≥ 0``; at 0 ``logp`` comes back as it is.

    Returns:
        A tensor of ``logp``'s shape, float32 (float64 for float64).

    Raises:
        ValidationError: ``eps`` is negative or not finite.
    """
    if isinstance(eps, bool) or not isinstance(eps, int | float) or not 0 <= eps < math.inf:
        raise ValidationError(f"eps is added to a probability: a finite number, 0 or more; got {eps!r}")
    x = _widened(logp, "logp")
    return x if eps == 0 else torch.logaddexp(x, x.new_full((), math.log(eps)))


def _widened(tensor: Tensor, name: str) -> Tensor:
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ValidationError(f"{name} must be a floating-point tensor, got {got}")
    return tensor if tensor.dtype is torch.float64 else tensor.float()


def _check(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    coldness: float,
) -> None:
    """Raise :class:`ValidationError` unless the arguments fit; the values of tensors are not looked at."""
    for name, tensor in (("hidden", hidden), ("weight", weight), ("target", target), ("bias", bias)):
        if tensor is None and name == "bias":
            continue
        if not isinstance(tensor, Tensor):
            raise ValidationError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.device != hidden.device:
            raise ValidationError(
                f"{name} is on {tensor.device}, hidden on {hidden.device}: move one of them"
            )
    if hidden.dtype not in DTYPES:
        raise ValidationError(f"hidden must be {DTYPE_NAMES}, got {hidden.dtype}")
    if hidden.dim() < 1:
        raise ValidationError("hidden must have shape [N, d], got a scalar")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValidationError(
            f"weight must have shape [V, {hidden.shape[-1]}] (hidden's width), got {list(weight.shape)}"
        )
    if weight.dtype is not hidden.dtype:
        raise ValidationError(
            f"weight must have hidden's dtype {hidden.dtype}, got {weight.dtype}: convert one of them"
        )
    if target.dtype is not torch.int64:
        raise ValidationError(f"target must be an int64 tensor, got {target.dtype}: use target.long()")
    if target.shape != hidden.shape[:-1]:
        raise ValidationError(f"target must have shape {list(hidden.shape[:-1])}, got {list(target.shape)}")
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != weight.shape[0]):
        raise ValidationError(f"bias must have shape [V] = [{weight.shape[0]}], got {list(bias.shape)}")
    if bias is not None and bias.dtype not in DTYPES:
        raise ValidationError(f"bias must be floating point, got {bias.dtype}: convert it to {DTYPE_NAMES}")
    for name, number in (("scale", scale), ("coldness", coldness)):
        if not _is_between(-math.inf, number):
            raise ValidationError(f"{name} must be a finite number, got {number!r}")
    if softcap is not None and not _is_between(0, softcap):
        raise ValidationError(f"softcap must be a positive number or None, got {softcap!r}")
    if torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad)):
        raise ValidationError(
            "the unembedding requires a gradient, which this op gives to hidden alone: freeze it with "
            "requires_grad_(False), pass weight.detach() and bias.detach(), or run under torch.no_grad()"
        )


def _is_between(low: float, number: Any) -> bool:
    try:
        return not isinstance(number, Tensor) and bool(low < number < math.inf)
    except TypeError:
        return False
