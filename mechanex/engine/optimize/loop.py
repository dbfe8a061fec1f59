"""The optimization loop: evaluate the current vector, see whether to stop, step.

It is a generator that asks for evaluations and is sent them. So one loop serves a vector alone, and many at once whose
requests :mod:`.jobs` answers together.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Generator
from dataclasses import replace

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ...errors import MechanexError, ValidationError
from .adam import adam_step, clipped
from .checkpoint import Checkpoint
from .constrain import constrain
from .noise import noise_of_step
from .passes import Evaluation, Request
from .settings import LIMIT
from .state import Best, Outcome, Run, State
from .stopping import step_limit

__all__ = ["optimization"]

_log = logging.getLogger(__name__)

# After these nothing more is done than to return what was found.
_FINAL = ("interrupted", "callback", "not finite")


def optimization(run: Run, checkpoint: Checkpoint) -> Generator[Request, Evaluation, Outcome]:
    """Optimizes a job's vector: yields requests, is sent evaluations, returns the outcome."""
    job = run.job
    checkpoint.open(run)
    try:
        if run.state.constrained is not None:
            outcome = run.state.constrained.outcome
        else:
            stopped = yield from _descend_until_stopped(run, checkpoint)
            chosen = _chosen(run, stopped)
            losses = chosen.losses
            if losses is None:  # minibatches saw only parts
                losses = (yield job.request(chosen.theta)).losses
            outcome = Outcome(chosen.theta, losses, run.state.adam.step, stopped)
        if job.settings.do_output_constr and outcome.stopped not in _FINAL:
            outcome = yield from constrain(run, outcome, checkpoint)
        return outcome
    finally:
        checkpoint.write(run)


def _descend_until_stopped(run: Run, checkpoint: Checkpoint) -> Generator[Request, Evaluation, str]:
    """The first phase, for which Ctrl-C is a reason to stop where the job asks for that."""
    try:
        return (yield from _descend(run, checkpoint))
    except KeyboardInterrupt:
        if not run.job.settings.keep_on_interrupt or run.seen is None:
            raise
        return "interrupted"


def _descend(run: Run, checkpoint: Checkpoint) -> Generator[Request, Evaluation, str]:
    """Steps until there is a reason to stop, which is returned."""
    job, settings = run.job, run.job.settings
    while True:
        state = run.state
        theta, step = state.adam.theta, state.adam.step
        evaluation = yield job.step_request(theta, step)
        if not evaluation.finite or not math.isfinite(float(job.parameters.norm(theta))):
            return _not_finite(run, evaluation)
        stopped, seen = yield from _assess(run, state, evaluation)
        run.seen = seen
        if stopped is not None:
            return stopped
        if step >= step_limit(settings):
            return _at_limit(run)
        gradient = evaluation.gradient
        if settings.noisy:
            gradient = yield from _noisy_gradient(run, theta, step, evaluation)
        assert gradient is not None
        adam = adam_step(state.adam, clipped(gradient, settings.grad_clip), settings.learning_rate(step))
        projected = job.parameters.project(adam.theta, settings.max_norm, settings.max_affine_norm)
        run.state = replace(seen, adam=replace(adam, theta=projected))
        checkpoint.write_sometimes(run)


def _assess(
    run: Run, state: State, evaluation: Evaluation
) -> Generator[Request, Evaluation, tuple[str | None, State]]:
    """Why to stop at the evaluated vector, or None, and the state with what its losses tell."""
    job, settings, losses = run.job, run.job.settings, evaluation.losses
    theta, step = state.adam.theta, state.adam.step
    run.loss = job.reported(losses, step)
    run.record(step, job.shown(losses, step), theta)
    epoch, whole = state.epoch, losses
    if job.minibatches is None:
        run.current = Best(job.score(losses, job.completions), theta, step, losses)
        better = state.best is None or run.current.score < state.best.score
        best = run.current if better else state.best
    else:
        # Losses of different minibatches don't compare: the latest vector is taken as the best.
        done, epoch = job.minibatches.collect(state.epoch, step, losses)
        best = run.current = Best(run.loss, theta, step, None)
        whole = done or []
    stopped, counters = None, state.counters
    if whole:
        stopped, counters = job.stopping.judge(counters, job.reported(whole), whole)
    state = replace(state, counters=counters, epoch=epoch, best=best)
    if job.eval_layout is not None:
        tired, state = yield from _watch(run, state)
        stopped = stopped or tired
    if settings.debug:
        norm = float(job.parameters.norm(theta))
        tqdm.write(f"step {step}: loss {run.loss:.6g}, norm {norm:.6g}")
    if settings.callback is not None and settings.callback(
        step, run.loss, job.parameters.vector(theta).clone()
    ):
        stopped = stopped or "callback"
    return stopped, state


def _watch(run: Run, state: State) -> Generator[Request, Evaluation, tuple[str | None, State]]:
    """The evaluation set's loss at the current vector: recorded, and with ``patience`` a reason to stop."""
    job, current = run.job, run.current
    assert current is not None
    losses = (yield job.eval_request(current.theta)).losses
    score = job.score(losses, job.eval_completions)
    run.evals[current.step :] = [score]
    if state.best_eval is None or score < state.best_eval.score:
        return None, replace(state, best_eval=replace(current, score=score), stale=0)
    stale = state.stale + 1
    patience = job.settings.patience
    tired = patience is not None and stale >= patience
    return ("patience" if tired else None), replace(state, stale=stale)


def _noisy_gradient(
    run: Run, theta: Tensor, step: int, clean: Evaluation
) -> Generator[Request, Evaluation, Tensor]:
    """The gradient of the objective, averaged over draws of noise on each completion's edit."""
    job, settings = run.job, run.job.settings
    assert job.layout is not None
    like = theta.new_empty(len(job.layout.signs), job.parameters.width)
    gradients = []
    for noise in noise_of_step(settings, job.seed, step, clean.gradient, like):
        request = replace(job.request(theta, job.objective), noise=noise)
        evaluation = yield job.sampled(request, step)
        assert evaluation.gradient is not None
        gradients.append(evaluation.gradient)
    return torch.stack(gradients).mean(0)


def _chosen(run: Run, stopped: str) -> Best:
    """The vector that is returned: the current one, or the best where the run was cut short or watched."""
    seen = run.seen
    if seen is not None and run.job.settings.patience is not None and seen.best_eval is not None:
        return seen.best_eval
    chosen = seen.best if seen is not None and stopped in ("interrupted", "not finite") else run.current
    assert chosen is not None
    return chosen


def _at_limit(run: Run) -> str:
    if run.job.settings.max_iters is not None:
        return "max_iters"
    _log.warning(
        "Optimization ended after %d steps without having converged; pass max_iters for another number.",
        LIMIT,
    )
    return "limit"


def _not_finite(run: Run, evaluation: Evaluation) -> str:
    """Ends a run whose losses, gradient or vector became NaN or infinite.

    Raises:
        ValidationError: that is so from the start; names the completion.
    """
    job = run.job
    asked = job.minibatches.counts(run.state.adam.step) if job.minibatches else range(len(evaluation.losses))
    bad = [
        (job.completions[i], evaluation.losses[i])
        for i in asked
        if not abs(evaluation.losses[i]) < float("inf")
    ]
    if bad:
        what = f"the loss of {bad[0][0]} is {bad[0][1]}"
    elif evaluation.finite:
        what = "the vector's norm is too large for a number"
    else:
        what = "the gradient holds NaN or infinite numbers"
    if run.seen is None:
        kind = ValidationError if run.state.adam.step == 0 else MechanexError
        raise kind(
            f"The vector can't be optimized: {what}. Check the model's weights and dtype, the starting vector's size, "
            "and eps (above 0 it keeps losses finite)."
        )
    _log.warning(
        "Optimization ended after %d steps because %s; the best vector so far is returned. Try a smaller lr, "
        "grad_clip or max_norm.",
        run.state.adam.step,
        what,
    )
    return "not finite"
