"""How far one distribution of next tokens is from another."""

from __future__ import annotations

import math

from torch import Tensor

__all__ = ["divergence"]


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p‖q) [...] in nats of natural log-probabilities [..., vocabulary]; differentiable.

    Tokens that ``p`` rules out (log-probability -inf) count nothing, also where ``q`` rules them out.
    """
    return (p.exp() * (p - q).masked_fill(p == -math.inf, 0.0)).sum(-1)
