"""What is minimised, the losses of completions or a function of them, with noise or without; and when that is enough.

A step minimises some function of the completions' losses. Only its derivative by each loss is needed, since the rest is
the chain rule: so an objective is a function from losses to weights.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from ...errors import ValidationError
from ...ops.logprob import log1mexp, log_add_eps
from .datapoints import Completion
from .layout import TokenOrder
from .settings import LossOptions, OptimizeSettings

__all__ = [
    "Counters",
    "Objective",
    "Stopping",
    "check_satisficing",
    "completion_losses",
    "counted",
    "draw",
    "noise_of_step",
    "plain_sum",
    "satisficing",
    "seeded",
    "tangent",
    "target_of",
]

Objective = Callable[[Tensor, Tensor], Tensor]
"""From losses [P] and the completions [P] int64 that they are of, the derivative [P] of what is minimised."""

# What a stream of random numbers is for; keeps streams of one seed apart.
Purpose = Literal["start", "noise", "shuffle"]
_MIX = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def completion_losses(logprobs: Tensor, order: TokenOrder, options: LossOptions) -> Tensor:
    """[..., P] losses of completions from [..., N] log-probabilities of their tokens.

    To promote (dst): −Σ log(p + eps). To suppress (src): −Σ log(1 − p + eps) with ``do_one_minus``, else +Σ log(p +
    eps). With ``normalize``, divided by the number of tokens.
    """
    # Each side's tokens are taken out first: an unused branch of a where() would turn infinite slopes into NaN.
    parts = []
    if order.dst.numel():
        parts.append(-log_add_eps(logprobs.index_select(-1, order.dst), options.eps))
    if order.src.numel():
        src = logprobs.index_select(-1, order.src)
        if options.do_one_minus:
            parts.append(-log_add_eps(log1mexp(src), options.eps))
        else:
            parts.append(log_add_eps(src, options.eps))
    tokens = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
    if options.normalize:
        tokens = tokens * order.share
    zero = tokens.new_zeros(*tokens.shape[:-1], order.completions.numel())
    return zero.index_add(-1, order.owner, tokens)


def plain_sum(losses: Tensor, completions: Tensor) -> Tensor:
    """Minimises the sum of the losses."""
    return torch.ones_like(losses)


def satisficing(targets: Tensor) -> Objective:
    """Minimises Σ (loss − target)², with a target [n] for every completion."""

    def derivative(losses: Tensor, completions: Tensor) -> Tensor:
        return 2 * (losses - targets[completions])

    return derivative


def counted(objective: Objective, counts: Tensor) -> Objective:
    """The same objective with every completion counted [n] times."""

    def derivative(losses: Tensor, completions: Tensor) -> Tensor:
        return objective(losses, completions) * counts[completions]

    return derivative


# Evaluations in which a loss on a plateau has not fallen enough.
PLATEAU = 3


@dataclass(frozen=True)
class Counters:
    """How often in a row the tests held, and the losses that the next one is compared with.

    Attributes:
        met: evaluations in a row that met the targets.
        still: evaluations in a row whose loss was that of the one before.
        previous: the loss of the last evaluation.
        first: the loss of the first one.
        mark: the loss that a plateau is measured from.
        waited: evaluations since the loss fell notably below ``mark``.
    """

    met: int = 0
    still: int = 0
    previous: float | None = None
    first: float | None = None
    mark: float | None = None
    waited: int = 0

    def marked(self, loss: float, plateau: float) -> Counters:
        """After an evaluation, whether it left the plateau: the fall since ``mark`` is that share of the whole one."""
        if self.first is None or self.mark is None:
            return replace(self, first=loss, mark=loss)
        if self.mark - loss > plateau * (self.first - loss):
            return replace(self, mark=loss, waited=0)
        return replace(self, waited=self.waited + 1)


def target_of(completion: Completion, settings: OptimizeSettings) -> float | None:
    """A completion's own target loss, else the common one, else None."""
    return settings.target_loss if completion.target is None else completion.target


def check_satisficing(settings: OptimizeSettings, completions: Sequence[Completion]) -> None:
    """Raises a ValidationError where ``satisfice`` is asked for and a completion has no target."""
    without = [c for c in completions if settings.satisfice and target_of(c, settings) is None]
    if without:
        raise ValidationError(
            f"satisfice needs a target loss for every completion, and {without[0]} has none: pass "
            f"target_loss, or give its datapoint {without[0].side}_completions_target_losses."
        )


class Stopping:
    """The tests of one job.

    Stops with "target_loss" when the targets were met, and with "converged" when the loss stood still, for
    ``target_loss_target_iters`` evaluations in a row; with "plateau" when it has hardly fallen in three.

    Targets are met when the sum of the losses is at or below ``target_loss`` (``do_target_loss_sum``), or when every
    completion is at or below its target: its own where its datapoint gives one, else the common one. With
    ``do_target_loss_sum`` that counts only if a datapoint gives one.

    Args:
        settings: the options.
        completions: whose losses are tested.

    Raises:
        ValidationError: a completion without a target, where ``satisfice`` is asked for or others have their own.
    """

    def __init__(self, settings: OptimizeSettings, completions: Sequence[Completion]) -> None:
        self._settings = settings
        check_satisficing(settings, completions)
        own = any(completion.target is not None for completion in completions)
        targets = [target_of(completion, settings) for completion in completions]
        by_sum = settings.do_target_loss_sum and settings.target_loss is not None
        self._sum = settings.target_loss if by_sum else None
        self._each: list[float] = []
        if own or not by_sum:
            self._each = [target for target in targets if target is not None]
        if own and len(self._each) < len(completions):
            one = completions[targets.index(None)]
            raise ValidationError(
                f"Some completions have a target loss of their own, and {one} has none, so nothing says when it is "
                f"good enough: pass target_loss for the rest, or give its datapoint "
                f"{one.side}_completions_target_losses."
            )

    def judge(self, before: Counters, loss: float, losses: Sequence[float]) -> tuple[str | None, Counters]:
        """Why to stop, or None, and the counters after this evaluation.

        Args:
            before: the counters so far.
            loss: what is reported, the sum of ``losses`` or their mean.
            losses: of every completion.
        """
        settings = self._settings
        met = self._sum is not None and loss <= self._sum
        met = met or (bool(self._each) and all(map(operator.le, losses, self._each)))
        last = math.inf if before.previous is None else before.previous
        still = abs(loss - last) < settings.eps * max(1.0, abs(loss))
        after = replace(
            before,
            met=before.met + 1 if met else 0,
            still=before.still + 1 if still else 0,
            previous=loss,
        )
        if settings.plateau is not None:
            after = after.marked(loss, settings.plateau)
        if after.met >= settings.target_loss_target_iters:
            return "target_loss", after
        if after.still >= settings.target_loss_target_iters:
            return "converged", after
        if after.waited >= PLATEAU:
            return "plateau", after
        return None, after


def seeded(seed: int, purpose: Purpose, number: int = 0) -> torch.Generator:
    """A generator of its own for every seed, purpose and step: what it gives doesn't depend on what was drawn before.

    So a resumed run, and a job among others, draws what an uninterrupted one would.
    """
    mixed = seed
    for part in (get_args(Purpose).index(purpose), number):
        # SplitMix64: neighbouring seeds and steps give unrelated streams.
        mixed = (mixed + _MIX[0] * (part + 1)) % 2**64
        mixed = ((mixed ^ (mixed >> 30)) * _MIX[1]) % 2**64
        mixed = ((mixed ^ (mixed >> 27)) * _MIX[2]) % 2**64
        mixed ^= mixed >> 31
    return torch.Generator().manual_seed(mixed % 2**63)


def draw(settings: OptimizeSettings, seed: int, step: int, slots: int, width: int) -> Tensor:
    """[noise_iters, slots, width] float32 on the CPU: Gaussian noise of a step, with ``do_antipgd`` less the last's.

    Anti-correlated noise: A. Orvieto et al., *Anticorrelated Noise Injection for Improved Generalization*, ICML 2022.
    """

    def gaussian(number: int) -> Tensor:
        generator = seeded(seed, "noise", number)
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


def noise_of_step(
    settings: OptimizeSettings, seed: int, step: int, gradient: Tensor | None, like: Tensor
) -> Tensor:
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
