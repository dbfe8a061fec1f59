"""The loop: of one vector, or of several at once whose losses and gradients shared passes compute.

In every iteration each run evaluates its vector, sees whether to stop, and steps: first down the objective
(:mod:`.descend`), then, where that was asked for, to the smallest vector that keeps the losses (:mod:`.constrain`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ...errors import ValidationError
from ..models.adapter import exclusive, undisturbed
from ..pack import usual_tokens
from ..ranks import current_ranks
from .checkpoint import Checkpoint, begin
from .constrain import Constraint
from .descend import Descent
from .passes import Evaluation, EvaluationRequest, Passes
from .problem import OptimizationJob
from .state import Outcome, Run

__all__ = ["Result", "run_jobs"]

Result = tuple[Any, ...]
"""(vector,), then the matrix of affine steering, then ``info`` if it was asked for."""
Phase = Descent | Constraint

# After these nothing more is done than to return what was found.
_FINAL = ("interrupted", "callback", "not finite")


def run_jobs(jobs: Sequence[OptimizationJob], *, progress: bool = False) -> list[Result]:
    """Optimizes several vectors of one model at once; each comes out as it would alone.

    Args:
        jobs: at least one, all of one model.
        progress: show a progress bar.

    Raises:
        ValidationError: no jobs, of several models, or with one checkpoint.
    """
    if not jobs:
        raise ValidationError("There is nothing to optimize: no jobs were given.")
    _check_checkpoints(jobs)
    adapter = jobs[0].adapter
    if any(job.adapter is not adapter for job in jobs):
        raise ValidationError(
            "Jobs that run together are of one model; run those of others in calls of their own."
        )
    given = [job.settings.batch_tokens for job in jobs if job.settings.batch_tokens is not None]
    usual = usual_tokens(adapter.device)
    with (
        exclusive(adapter),
        torch.inference_mode(False),
        undisturbed(adapter.hf_model),
        Passes(adapter, [job.layers for job in jobs], min(given, default=usual)) as passes,
    ):
        passes.prepare([job.spec for job in jobs])
        passes.prepare([job.eval_spec for job in jobs if job.eval_spec is not None])
        ranks = current_ranks(None)
        with ranks.together():
            runs = [begin(job) for job in jobs]
        ranks.check_begin([run.state.adam.step for run in runs])
        with _bar(runs, progress and ranks.first) as show:
            outcomes = optimize(runs, passes, show)
    return [_result(run, outcome) for run, outcome in zip(runs, outcomes, strict=True)]


def optimize(runs: Sequence[Run], passes: Passes, show: Callable[[], None]) -> list[Outcome]:
    """Takes runs to their ends, side by side; ``show`` is called after every iteration."""
    checkpoints: dict[Run, Checkpoint] = {}
    outcomes: dict[Run, Outcome] = {}
    phases: list[Phase] = []
    try:
        for run in runs:
            checkpoint = Checkpoint(run)
            with current_ranks(None).together():
                checkpoint.write(first=True)
            checkpoints[run] = checkpoint
            phases.append(_phase(run))
        while phases:
            try:
                stopped = _iterate(phases, passes)
                show()
            except KeyboardInterrupt:
                kept = (p.run.job.settings.keep_on_interrupt and p.seen is not None for p in phases)
                # Other processes that share the work may have been stopped elsewhere.
                if current_ranks(None).size > 1 or not all(kept):
                    raise
                stopped = ["interrupted"] * len(phases)
            going = []
            for phase, reason in zip(phases, stopped, strict=True):
                run = phase.run
                if reason is None:
                    checkpoints[run].write_sometimes()
                    going.append(phase)
                    continue
                outcome = phase.outcome(reason, passes)
                second = isinstance(phase, Descent) and run.job.settings.do_output_constr
                if second and reason not in _FINAL:
                    going.append(Constraint(run, outcome))
                else:
                    checkpoints[run].write()
                    outcomes[run] = outcome
            if len(going) < len(phases):
                passes.forget()
            phases = going
    finally:
        for run, checkpoint in checkpoints.items():
            if run not in outcomes:
                checkpoint.write()
    return [outcomes[run] for run in runs]


def _phase(run: Run) -> Phase:
    """The phase that a run is in."""
    second = run.state.constrained
    return Descent(run) if second is None else Constraint(run, second.outcome)


def _iterate(phases: Sequence[Phase], passes: Passes) -> list[str | None]:
    """One iteration of every run: evaluates the current vectors and steps from them; tells who stops, and why."""
    found = passes.run([phase.request() for phase in phases])
    watched = _asked(passes, [phase.eval_request() for phase in phases])
    stopped = [
        phase.judge(evaluation, None if of_eval is None else of_eval.losses)
        for phase, evaluation, of_eval in zip(phases, found, watched, strict=True)
    ]
    going = [(phase, found[i]) for i, phase in enumerate(phases) if stopped[i] is None]
    for (phase, _), gradient in zip(going, _gradients(going, passes), strict=True):
        phase.step(gradient)
    return stopped


def _gradients(going: Sequence[tuple[Phase, Evaluation]], passes: Passes) -> list[Tensor]:
    """What each run steps along: the gradient at its vector, or with noise the mean over draws of it."""
    draws = [phase.noisy_requests(evaluation) for phase, evaluation in going]
    gradients: list[list[Tensor]] = [[] for _ in draws]
    for n in range(max(map(len, draws), default=0)):
        answers = _asked(passes, [draw[n] if n < len(draw) else None for draw in draws])
        for own, answer in zip(gradients, answers, strict=True):
            if answer is not None and answer.gradient is not None:
                own.append(answer.gradient)
    found = []
    for own, (_, evaluation) in zip(gradients, going, strict=True):
        gradient = torch.stack(own).mean(0) if own else evaluation.gradient
        assert gradient is not None
        found.append(gradient)
    return found


def _asked(passes: Passes, requests: Sequence[EvaluationRequest | None]) -> list[Evaluation | None]:
    """An evaluation for every request that there is."""
    answers = iter(passes.run([request for request in requests if request is not None]))
    return [None if request is None else next(answers) for request in requests]


def _check_checkpoints(jobs: Sequence[OptimizationJob]) -> None:
    first: dict[Path, int] = {}
    for i, job in enumerate(jobs):
        path = job.settings.checkpoint
        if path is not None and first.setdefault(Path(path).resolve(), i) != i:
            raise ValidationError(
                f"Job {first[Path(path).resolve()]} and job {i} have one checkpoint, {path}, and would overwrite each "
                "other's; name a file for each."
            )


@contextmanager
def _bar(runs: Sequence[Run], progress: bool) -> Iterator[Callable[[], None]]:
    """A progress bar over the runs, and the function that moves it on."""
    limits = [run.job.settings.max_iters for run in runs]
    total = None if None in limits else max(n for n in limits if n is not None)
    with tqdm(total=total, desc="Optimizing by gradient descent", unit="step", disable=not progress) as bar:
        yield lambda: _show(bar, runs) if progress else None


def _show(bar: Any, runs: Sequence[Run]) -> None:
    states = [run.state for run in runs]
    second = [state.constrained.step for state in states if state.constrained is not None]
    step = max(state.adam.step for state in states) + max(second, default=0)
    shown = [run.loss for run in runs]
    norms = [
        float(run.job.parameters.norm((state.constrained or state).adam.theta))
        for run, state in zip(runs, states, strict=True)
    ]
    bar.set_postfix(
        loss=f"{sum(shown) / len(shown):.4g}", norm=f"{sum(norms) / len(norms):.4g}", refresh=False
    )
    bar.update(step - bar.n)


def _result(run: Run, outcome: Outcome) -> Result:
    job, theta = run.job, outcome.theta.detach()
    parameters, settings = job.parameters, job.settings
    result: list[Any] = [parameters.vector(theta).clone()]
    matrix, factors = parameters.matrix(theta), parameters.factors(theta)
    if matrix is not None:
        result.append(matrix)
    if not settings.return_info:
        return tuple(result)
    info: dict[str, Any] = {
        "iters": outcome.steps,
        "loss": job.shown(outcome.losses),
        "norm": float(parameters.norm(theta)),
        "starting_loss": run.start,
        "stopped": outcome.stopped,
        "seed": job.seed,
    }
    if settings.return_loss_history:
        info["loss_history"] = run.shown
    if settings.return_vec_history:
        info["vec_history"] = run.vectors
    if job.eval_spec is not None:
        info["eval_loss_history"] = run.evals
    if factors is not None:
        info["matrix_left"], info["matrix_right"] = factors[0].clone(), factors[1].clone()
    if outcome.constrained_steps is not None:
        info["output_constr_iters"] = outcome.constrained_steps
        info["output_constr_stopped"] = outcome.constrained_stopped
    return (*result, info)
