"""The first phase: Adam on the objective, until the losses are good enough or stand still."""

from __future__ import annotations

import logging
import math
from dataclasses import replace

from torch import Tensor
from tqdm.auto import tqdm

from ...errors import MechanexError, ValidationError
from .objective import noise_of_step
from .parameters import adam_step, clipped
from .passes import Evaluation, EvaluationRequest, Passes
from .settings import LIMIT
from .state import Best, Outcome, Run, State

__all__ = ["Descent"]

_log = logging.getLogger(__name__)


class Descent:
    """A run that minimises the objective.

    Attributes:
        seen: the run's state with what the evaluation of the current vector told, None before the first; what a result
            is chosen from.
        current: the vector that was evaluated last.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.seen: State | None = None
        self.current: Best | None = None

    def request(self) -> EvaluationRequest:
        """What an iteration needs of the current vector without noise."""
        adam = self.run.state.adam
        return self.run.job.step_request(adam.theta, adam.step)

    def eval_request(self) -> EvaluationRequest | None:
        """The evaluation set's losses at the current vector, where there is one."""
        return self.run.job.eval_request(self.run.state.adam.theta)

    def judge(self, found: Evaluation, eval_losses: list[float] | None) -> str | None:
        """Why to stop at the current vector, or None."""
        job, adam = self.run.job, self.run.state.adam
        if not found.finite or not math.isfinite(float(job.parameters.norm(adam.theta))):
            return self._not_finite(found)
        stopped, self.seen = self._assessed(found.losses, eval_losses)
        if stopped is None and adam.step >= job.settings.step_limit:
            stopped = self._at_limit()
        return stopped

    def _assessed(self, losses: list[float], eval_losses: list[float] | None) -> tuple[str | None, State]:
        """Why to stop at the evaluated vector, or None, and the state with what its losses tell."""
        run, state, job, settings = self.run, self.run.state, self.run.job, self.run.job.settings
        theta, step = state.adam.theta, state.adam.step
        run.loss = job.reported(losses, step)
        run.record(step, job.shown(losses, step), theta)
        epoch, whole = state.epoch, losses
        if job.minibatches is None:
            self.current = Best(job.score(losses, job.completions), theta, step, losses)
            better = state.best is None or self.current.score < state.best.score
            best = self.current if better else state.best
        else:
            # Losses of different minibatches don't compare: the latest vector is taken as the best.
            done, epoch = job.minibatches.collect(state.epoch, step, losses)
            best = self.current = Best(run.loss, theta, step, None)
            whole = done or []
        stopped, counters = None, state.counters
        if whole:
            stopped, counters = job.stopping.judge(counters, job.reported(whole), whole)
        state = replace(state, counters=counters, epoch=epoch, best=best)
        if eval_losses is not None:
            tired, state = self._watched(state, self.current, eval_losses)
            stopped = stopped or tired
        if settings.debug:
            norm = float(job.parameters.norm(theta))
            tqdm.write(f"step {step}: loss {run.loss:.6g}, norm {norm:.6g}")
        vector = job.parameters.vector(theta)
        if settings.callback is not None and settings.callback(step, run.loss, vector.clone()):
            stopped = stopped or "callback"
        return stopped, state

    def _watched(self, state: State, current: Best, losses: list[float]) -> tuple[str | None, State]:
        """The evaluation set's loss at the current vector: recorded, and with ``patience`` a reason to stop."""
        job, patience = self.run.job, self.run.job.settings.patience
        score = job.score(losses, job.eval_completions)
        self.run.evals[current.step :] = [score]
        if state.best_eval is None or score < state.best_eval.score:
            return None, replace(state, best_eval=replace(current, score=score), stale=0)
        stale = state.stale + 1
        tired = patience is not None and stale >= patience
        return ("patience" if tired else None), replace(state, stale=stale)

    def noisy_requests(self, found: Evaluation) -> list[EvaluationRequest]:
        """Whose gradients' mean the step takes in place of ``found``'s; none without noise."""
        job, settings, adam = self.run.job, self.run.job.settings, self.run.state.adam
        if not settings.noisy:
            return []
        like = adam.theta.new_empty(len(job.spec.negated), job.parameters.width)
        request = job.request(adam.theta, job.objective)
        return [
            job.sampled(replace(request, noise=noise), adam.step)
            for noise in noise_of_step(settings, job.seed, adam.step, found.gradient, like)
        ]

    def step(self, gradient: Tensor) -> None:
        """Goes on to the next vector."""
        assert self.seen is not None
        job, settings, before = self.run.job, self.run.job.settings, self.run.state.adam
        adam = adam_step(before, clipped(gradient, settings.grad_clip), settings.learning_rate(before.step))
        projected = job.parameters.project(adam.theta, settings.max_norm, settings.max_affine_norm)
        self.run.state = replace(self.seen, adam=replace(adam, theta=projected))

    def outcome(self, stopped: str, passes: Passes) -> Outcome:
        """The vector that is returned, and its losses."""
        chosen = self._chosen(stopped)
        losses = chosen.losses
        if losses is None:  # minibatches saw only parts
            (found,) = passes.run([self.run.job.request(chosen.theta)])
            losses = found.losses
        return Outcome(chosen.theta, losses, self.run.state.adam.step, stopped)

    def _chosen(self, stopped: str) -> Best:
        """The vector that is returned: the current one, or the best where the run was cut short or watched."""
        seen = self.seen
        if seen is not None and self.run.job.settings.patience is not None and seen.best_eval is not None:
            return seen.best_eval
        chosen = seen.best if seen is not None and stopped in ("interrupted", "not finite") else self.current
        assert chosen is not None
        return chosen

    def _at_limit(self) -> str:
        if self.run.job.settings.max_iters is not None:
            return "max_iters"
        _log.warning(
            "Optimization ended after %d steps without having converged; pass max_iters for another number.",
            LIMIT,
        )
        return "limit"

    def _not_finite(self, found: Evaluation) -> str:
        """Ends a run whose losses, gradient or vector became NaN or infinite.

        Raises:
            ValidationError: that is so from the start; names the completion.
        """
        job, step = self.run.job, self.run.state.adam.step
        asked = job.minibatches.counts(step) if job.minibatches else range(len(found.losses))
        bad = [i for i in asked if not math.isfinite(found.losses[i])]
        if bad:
            what = f"the loss of {job.completions[bad[0]]} is {found.losses[bad[0]]}"
        elif found.finite:
            what = "the vector's norm is too large for a number"
        else:
            what = "the gradient holds NaN or infinite numbers"
        if self.seen is None:
            kind = ValidationError if step == 0 else MechanexError
            raise kind(
                f"The vector can't be optimized: {what}. Check the model's weights and dtype, the starting vector's "
                "size, and eps (above 0 it keeps losses finite)."
            )
        _log.warning(
            "Optimization ended after %d steps because %s; the best vector so far is returned. Try a smaller lr, "
            "grad_clip or max_norm.",
            step,
            what,
        )
        return "not finite"
