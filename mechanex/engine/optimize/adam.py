"""Adam (arXiv:1412.6980) as a function from one state to the next, so that an interrupt can't leave half a step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["AdamState", "adam_step", "clipped"]

BETAS = (0.9, 0.999)
TINY = 1e-8


@dataclass(frozen=True, eq=False)
class AdamState:
    """θ [n], the running means of its gradient and of the gradient's square, and the steps taken."""

    theta: Tensor
    mean: Tensor
    square: Tensor
    step: int = 0

    @classmethod
    def start(cls, theta: Tensor) -> AdamState:
        """Before the first step."""
        return cls(theta, torch.zeros_like(theta), torch.zeros_like(theta))


def adam_step(state: AdamState, gradient: Tensor, lr: float) -> AdamState:
    """The state after one step; the given one stays as it is."""
    step = state.step + 1
    mean = state.mean.lerp(gradient, 1 - BETAS[0])
    square = state.square * BETAS[1] + (1 - BETAS[1]) * gradient * gradient
    size = (square.sqrt() / (1 - BETAS[1] ** step) ** 0.5).add_(TINY)
    factor = min(lr / (1 - BETAS[0] ** step), torch.finfo(state.theta.dtype).max)
    theta = state.theta.addcdiv(mean, size, value=-factor)
    return AdamState(theta, mean, square, step)


def clipped(gradient: Tensor, longest: float | None) -> Tensor:
    """The gradient, rescaled to norm ``longest`` where it is longer."""
    if longest is None:
        return gradient
    norm = gradient.norm()
    return torch.where(norm > longest, gradient * (longest / norm), gradient)
