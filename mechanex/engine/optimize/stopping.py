"""When optimization ends: the tests on the loss of the current vector, before the next step."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ...errors import ValidationError
from .datapoints import Completion
from .settings import LIMIT, Settings

__all__ = ["Counters", "Stopping", "check_satisficing", "step_limit", "target_of"]


@dataclass(frozen=True)
class Counters:
    """How often in a row the tests held, and the loss that the next one is compared with."""

    met: int = 0
    still: int = 0
    previous: float | None = None


def target_of(completion: Completion, settings: Settings) -> float | None:
    """A completion's own target loss, else the common one, else None."""
    return settings.target_loss if completion.target is None else completion.target


def check_satisficing(settings: Settings, completions: Sequence[Completion]) -> None:
    """Raises a ValidationError where ``satisfice`` is asked for and a completion has no target."""
    without = [c for c in completions if settings.satisfice and target_of(c, settings) is None]
    if without:
        raise ValidationError(
            f"satisfice needs a target loss for every completion, and {without[0]} has none: pass "
            f"target_loss, or give its datapoint {without[0].side}_completions_target_losses."
        )


def step_limit(settings: Settings) -> int:
    """The most steps that are taken."""
    return LIMIT if settings.max_iters is None else settings.max_iters


class Stopping:
    """The tests of one job.

    Stops with "target_loss" when the targets were met, and with "converged" when the loss stood still, for
    ``target_loss_target_iters`` evaluations in a row. Targets are met when the sum of the losses is at or below
    ``target_loss`` (``do_target_loss_sum``), or when every completion is at or below its target: its own where its
    datapoint gives one, else the common one. With ``do_target_loss_sum`` that counts only if a datapoint gives one.

    Args:
        settings: the options.
        completions: whose losses are tested.

    Raises:
        ValidationError: a completion without a target, where ``satisfice`` is asked for or others have their own.
    """

    def __init__(self, settings: Settings, completions: Sequence[Completion]) -> None:
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
        if after.met >= settings.target_loss_target_iters:
            return "target_loss", after
        if after.still >= settings.target_loss_target_iters:
            return "converged", after
        return None, after
