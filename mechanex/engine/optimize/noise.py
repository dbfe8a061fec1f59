"""Noise on a vector's effect: how it is drawn, anti-correlated, and kept off the direction of the gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from .settings import Settings

__all__ = ["draw", "noise_of_step", "seeded", "tangent"]

# What a stream of random numbers is for; keeps streams of one seed apart.
START, NOISE, SHUFFLE = range(3)
_MIX = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def seeded(seed: int, purpose: int, number: int = 0) -> torch.Generator:
    """A generator of its own for every seed, purpose and step: what it gives doesn't depend on what was drawn before.

    So a resumed run, and a job among others, draws what an uninterrupted one would.
    """
    mixed = seed
    for part in (purpose, number):
        # SplitMix64: neighbouring seeds and steps give unrelated streams.
        mixed = (mixed + _MIX[0] * (part + 1)) % 2**64
        mixed = ((mixed ^ (mixed >> 30)) * _MIX[1]) % 2**64
        mixed = ((mixed ^ (mixed >> 27)) * _MIX[2]) % 2**64
        mixed ^= mixed >> 31
    return torch.Generator().manual_seed(mixed % 2**63)


def draw(settings: Settings, seed: int, step: int, slots: int, width: int) -> Tensor:
    """[noise_iters, slots, width] float32 on the CPU: Gaussian noise of a step, with ``do_antipgd`` less the last's.

    Anti-correlated noise: A. Orvieto et al., *Anticorrelated Noise Injection for Improved Generalization*, ICML 2022.
    """

    def gaussian(number: int) -> Tensor:
        generator = seeded(seed, NOISE, number)
        return (settings.noise_scale or 0.0) * torch.randn(
            settings.noise_iters, slots, width, generator=generator
        )

    noise = gaussian(step)
    return noise - gaussian(step - 1) if settings.do_antipgd and step else noise


def tangent(noise: Tensor, gradient: Tensor, *, only_descent: bool = False) -> Tensor:
    """Noise n [..., K, d] without its part along the gradient g [K, d] of each slot: n − (n·g)g/‖g‖².

    Args:
        noise: n.
        gradient: g; where it is zero nothing is removed.
        only_descent: remove the part only where it points along −g, so that noise never lowers the loss.
    """
    square = gradient.square().sum(-1, keepdim=True)
    along = (noise * gradient).sum(-1, keepdim=True)
    if only_descent:
        along = along.clamp(max=0)
    return noise - torch.where(square > 0, along / square, torch.zeros_like(along)) * gradient


def noise_of_step(settings: Settings, seed: int, step: int, gradient: Tensor | None, like: Tensor) -> Tensor:
    """[noise_iters, K, d] noise of a step, as it is added.

    Args:
        settings: the options.
        seed: of the run.
        step: counted from 0.
        gradient: [K, d] of each completion's loss by what the noise is added to, without noise; None leaves the
            noise as it is drawn.
        like: [K, d], for its shape, device and dtype.
    """
    noise = draw(settings, seed, step, *like.shape).to(like)
    if gradient is None:
        return noise
    return tangent(noise, gradient, only_descent=settings.do_noise_abl_relu)
