"""Jobs run together: their loops take turns, and what they ask for at the same time is computed in shared passes."""

from __future__ import annotations

from collections.abc import Generator, Hashable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ...errors import ValidationError
from ..models.adapter import exclusive, undisturbed
from ..pack import BATCH_TOKENS, BATCH_TOKENS_GPU
from .checkpoint import Checkpoint, begin
from .job import Job
from .layout import Layout, LayoutSpec
from .loop import optimization
from .passes import Evaluation, Passes, Request
from .state import Outcome, Run

__all__ = ["Result", "run_jobs"]

Result = tuple[Any, ...]
"""(vector,), then the matrix of affine steering, then ``info`` if it was asked for."""


def run_jobs(jobs: Sequence[Job], *, progress: bool = False) -> list[Result]:
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
    usual = BATCH_TOKENS if adapter.device.type == "cpu" else BATCH_TOKENS_GPU
    layers = [layer for job in jobs for layer in job.layers]
    with (
        exclusive(adapter),
        torch.inference_mode(False),
        undisturbed(adapter.hf_model),
        Passes(adapter, layers, [job.layers[0] for job in jobs], min(given, default=usual)) as passes,
    ):
        lay_out(jobs)
        runs = [begin(job) for job in jobs]
        outcomes = _drive(runs, passes, progress)
    return [_result(run, outcome) for run, outcome in zip(runs, outcomes, strict=True)]


def _check_checkpoints(jobs: Sequence[Job]) -> None:
    first: dict[Path, int] = {}
    for i, job in enumerate(jobs):
        path = job.settings.checkpoint
        if path is not None and first.setdefault(Path(path).resolve(), i) != i:
            raise ValidationError(
                f"Job {first[Path(path).resolve()]} and job {i} have one checkpoint, {path}, and would overwrite each "
                "other's; name a file for each."
            )


def lay_out(jobs: Sequence[Job]) -> None:
    """Gives every job its layouts, one for all whose completions and edits agree."""
    known: dict[Hashable, Layout] = {}

    def layout(job: Job, spec: LayoutSpec) -> Layout:
        if spec.key not in known:
            known[spec.key] = Layout(job.adapter, spec)
        return known[spec.key]

    for job in jobs:
        job.layout = layout(job, job.spec)
        job.eval_layout = None if job.eval_spec is None else layout(job, job.eval_spec)


class _Drive:
    """The jobs' loops, and what each of them waits for."""

    def __init__(self, runs: list[Run]) -> None:
        self.runs = runs
        self.loops = [optimization(run, Checkpoint(run.job.settings.checkpoint)) for run in runs]
        self.asking: dict[int, Request] = {}
        self.outcomes: dict[int, Outcome] = {}

    def send(self, i: int, evaluation: Evaluation | None) -> None:
        """Lets a loop go on until its next request or its end."""
        self._go_on(i, lambda loop: loop.send(evaluation))

    def interrupt(self, error: KeyboardInterrupt) -> None:
        """Tells every loop of Ctrl-C, which goes through it unless its job keeps what it has."""
        for i in list(self.asking):
            self._go_on(i, lambda loop: loop.throw(error))

    def _go_on(self, i: int, move: Any) -> None:
        loop: Generator[Request, Evaluation, Outcome] = self.loops[i]
        try:
            self.asking[i] = move(loop)
        except StopIteration as end:
            self.outcomes[i] = end.value
            self.asking.pop(i, None)
            if end.value.stopped == "interrupted" or end.value.constrained_stopped == "interrupted":
                self.interrupt(KeyboardInterrupt())


def _drive(runs: list[Run], passes: Passes, progress: bool) -> list[Outcome]:
    drive = _Drive(runs)
    limits = [run.job.settings.max_iters for run in runs]
    total = max((n for n in limits if n is not None), default=None) if None not in limits else None
    with tqdm(total=total, desc="Optimizing", unit="step", disable=not progress) as bar:
        try:
            for i in range(len(runs)):
                drive.send(i, None)
            while drive.asking:
                waiting = list(drive.asking)
                try:
                    answers = passes.run([drive.asking[i] for i in waiting])
                except KeyboardInterrupt as error:
                    drive.interrupt(error)
                    continue
                for i, answer in zip(waiting, answers, strict=True):
                    if i in drive.asking:
                        drive.send(i, answer)
                if len(drive.asking) < len(waiting):
                    passes.forget()
                if progress:
                    _show(bar, runs)
        finally:
            for loop in drive.loops:
                loop.close()
    return [drive.outcomes[i] for i in range(len(runs))]


def _show(bar: Any, runs: list[Run]) -> None:
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
    if job.eval_layout is not None:
        info["eval_loss_history"] = run.evals
    if factors is not None:
        info["matrix_left"], info["matrix_right"] = factors[0].clone(), factors[1].clone()
    if outcome.constrained_steps is not None:
        info["output_constr_iters"] = outcome.constrained_steps
        info["output_constr_stopped"] = outcome.constrained_stopped
    return (*result, info)
