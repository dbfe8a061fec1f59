"""Completion log-probabilities in plain torch: the chunked op with a reduction of a few passes, and the mathematics."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .chunked import Chunked, Head
from .eager import compute_dtype, without_autocast

__all__ = ["OP", "plain"]


def _reduce(
    head: Head, products: Tensor, first: int, target: Tensor, maximum: Tensor, total: Tensor, with_slope: bool
) -> Tensor | None:
    """See :data:`mechanex.backends.chunked.Reduce`."""
    bias = None if head.bias is None else head.bias[first : first + products.shape[1]]
    logits, bend = head.logits(products.to(maximum.dtype), bias)
    local = target.unsqueeze(1) - first
    inside = (local >= 0) & (local < products.shape[1])
    local = local.clamp(0, products.shape[1] - 1)
    logits.scatter_(1, local, logits.gather(1, local).masked_fill(inside, -math.inf))
    highest = torch.maximum(maximum, logits.amax(1))
    # While every logit is −inf, any finite number serves: each share is 0.
    reference = highest.masked_fill(highest == -math.inf, 0)
    factor = torch.exp(maximum - reference)
    shares = logits.sub_(reference.unsqueeze(1)).exp_()
    total.mul_(factor).add_(shares.sum(1))
    maximum.copy_(highest)
    if not with_slope:
        return None
    products.copy_(shares if bend is None else shares.mul_(bend))
    return factor


OP = Chunked(_reduce)


@without_autocast
def plain(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    coldness: float,
) -> Tensor:
    """The log-probabilities as mathematics: every logit is stored, and torch may differentiate and transform it."""
    wide = compute_dtype(hidden)
    products = hidden.to(wide) @ weight.to(wide).T
    logits, _ = Head(weight, bias, scale, softcap, coldness).logits(products, bias)
    return torch.log_softmax(logits, -1).gather(-1, target.unsqueeze(-1)).squeeze(-1)
