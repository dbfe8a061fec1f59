"""How far one distribution of next tokens is from another."""

from __future__ import annotations

import math

from torch import Tensor

from .intervention import compute_dtype

__all__ = ["divergence", "log_probabilities", "shift"]


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p‖q) [...] in nats of natural log-probabilities [..., vocabulary]; differentiable.

    Tokens that ``p`` rules out (log-probability -inf) count nothing, also where ``q`` rules them out.
    """
    return (p.exp() * (p - q).masked_fill(p == -math.inf, 0.0)).sum(-1)


def log_probabilities(logits: Tensor) -> Tensor:
    """Natural log-probabilities [..., vocabulary], of narrow dtypes in float32."""
    return logits.to(compute_dtype(logits.dtype)).log_softmax(-1)


def shift(steered: Tensor, plain: Tensor) -> Tensor:
    """How far steering moves tokens' distributions: KL(steered‖plain) [...] in nats, at least 0, of natural
    log-probabilities [..., vocabulary]."""
    return divergence(steered, plain).clamp(min=0)
