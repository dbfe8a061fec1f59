"""Completion log-probabilities by the Triton kernels of `kernels/logprob.py` and `kernels/logprob_reduce.py`.

Without a gradient, one kernel multiplies and reduces, and no logit reaches memory: half types on tensor cores, and
float32 where the rows are so few that reading the weights is what takes the time. With one, the walk of
:mod:`mechanex.backends.chunked` needs two vendor products in all, where a kernel that computes the logits again would
need three: an accumulator of whole rows (128 of 8,192 float32 numbers: 4 MiB) fits no multiprocessor, so that the
logits' gradients pass through memory either way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .chunked import Chunked, Head, check_target
from .triton import _kernel

__all__ = ["OP", "completion_logprob", "fuses", "refuses_completion_logprob"]

_HALF = (torch.bfloat16, torch.float16)
# Rows of float32, which has no tensor cores, up to which reading the weights takes longer than multiplying them.
_FLOAT_ROWS = 16


def refuses_completion_logprob(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, *numbers: Any
) -> str | None:
    """Why the kernels can't take these arguments, or None."""
    for tensor in (hidden, weight, bias):
        if tensor is not None and tensor.is_neg():
            return "an argument is a lazily negated view, whose memory holds other values: call resolve_neg()"
    return None


def fuses(hidden: Tensor) -> bool:
    """Whether one kernel multiplies and reduces."""
    return hidden.dtype in _HALF or (hidden.dtype is torch.float32 and hidden.shape[0] <= _FLOAT_ROWS)


def completion_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    coldness: float,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and log-sum-exps; as :func:`mechanex.backends.reference.completion_logprob`.

    Raises:
        ValidationError: a target is out of range (interpreter; a GPU gives NaN rows).
    """
    if not fuses(hidden):
        return OP.run(hidden, weight, target, bias, scale, softcap, coldness)
    if target.device.type == "cpu":
        check_target(target, weight.shape[0])
    found: tuple[Tensor, Tensor] = _kernel("logprob").logprob(
        hidden, weight, target, bias, scale, softcap, coldness
    )
    return found


def _reduce(
    head: Head, products: Tensor, first: int, target: Tensor, maximum: Tensor, total: Tensor, with_slope: bool
) -> Tensor | None:
    """See :data:`mechanex.backends.chunked.Reduce`."""
    bias = None if head.bias is None else head.bias[first : first + products.shape[1]]
    found: Tensor | None = _kernel("logprob_reduce").reduce(
        products, bias, first, target, maximum, total, head.scale, head.softcap, head.coldness, with_slope
    )
    return found


OP = Chunked(_reduce)
