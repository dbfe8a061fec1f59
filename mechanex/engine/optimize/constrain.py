"""The output-constrained phase: the smallest vector that keeps every loss that was reached.

Minimises a cost f(θ), the norm or a function of the user's, subject to loss_i(θ) ≤ bound_i, by the modified
differential method of multipliers (J. Platt and A. Barr, *Constrained Differential Optimization*, NeurIPS 1987) in
its form for
inequalities: θ goes along −∇f − Σ max(0, λ_i + c·g_i)·∇loss_i with g_i = loss_i − bound_i + margin_i, while every
multiplier λ_i rises with its g_i and never falls below 0. Losses swing around what they are held to, so each is held to
less than its bound, by a margin as wide as it has lately swung: then vectors that keep all bounds at once do come by.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Generator
from dataclasses import replace

import torch
from torch import Tensor

from .adam import AdamState, adam_step, clipped
from .checkpoint import Checkpoint
from .custom import CustomCost
from .job import Job
from .losses import Objective, plain_sum
from .passes import Evaluation, Request
from .state import Best, ConstrainState, Outcome, Run

__all__ = ["constrain"]

_log = logging.getLogger(__name__)

PATIENCE = 20
# A loss that depends little on θ stays above its bound for long: after so many steps its multiplier grows at this rate.
STREAK = 5
GROWTH = 1.1
# Steps too long for the constraints leave the feasible vectors at once: then they are cut to a share, so many times.
RESTARTS = 4
SHARE = 0.25
LEAST_GAIN = 1e-3
# Per step, of the stiffness: how fast multipliers follow their constraints. Measured on mx-tiny: faster ones swing.
ASCENT = 0.01
# Per step, how much of a margin stays once its loss keeps below the bound.
FADING = 0.97

Cost = Callable[[Tensor], tuple[float, Tensor]]
"""From θ the cost and its gradient."""


def constrain(run: Run, outcome: Outcome, checkpoint: Checkpoint) -> Generator[Request, Evaluation, Outcome]:
    """Starts from the first phase's outcome and returns the best feasible vector, which may be that one."""
    job, settings = run.job, run.job.settings
    cost, max_norm = _cost(job, outcome)
    bounds = torch.tensor(
        [loss + settings.eps * max(1.0, abs(loss)) for loss in outcome.losses], dtype=torch.float64
    )
    if run.state.constrained is None:
        start = Best(math.inf, outcome.theta, 0, outcome.losses)
        began = ConstrainState(
            outcome,
            AdamState.start(outcome.theta),
            multipliers=None,
            margins=torch.zeros_like(bounds),
            over=torch.zeros_like(bounds),
            stiffness=0.0,
            best=start,
            began=math.inf,
            mark=math.inf,
            waited=0,
            lr=settings.output_constr_lr or settings.lr,
        )
        run.state = replace(run.state, constrained=began)
    stopped, seen = "max_output_constr_iters", run.state.constrained
    try:
        while True:
            state = run.state.constrained
            assert state is not None
            theta = state.adam.theta
            evaluation = yield job.request(theta, _lagrangian(state, bounds))
            value, slope = cost(theta)
            if not evaluation.finite or not math.isfinite(value):
                stopped = "not finite"
                break
            found = torch.tensor(evaluation.losses, dtype=torch.float64)
            violations = found - bounds
            feasible = bool((violations <= 0).all())
            # Only a whole iteration goes into the run's state: what goes on from there evaluates this vector again.
            seen = state = _compared(state, value, feasible, evaluation.losses)
            if (
                settings.max_output_constr_iters is not None
                and state.step >= settings.max_output_constr_iters
            ):
                break
            if state.waited >= PATIENCE:
                strayed = not feasible or value > state.best.score
                if _gained(state) or not strayed or state.restarts >= RESTARTS:
                    stopped = "converged"
                    break
                run.state = replace(run.state, constrained=_restarted(state))
                continue
            gradient = evaluation.gradient
            assert gradient is not None
            if state.multipliers is None:
                state = _balanced(state, slope, gradient, len(bounds))
                assert state.multipliers is not None
                gradient = gradient * state.multipliers[0].to(gradient)
            else:
                aim = violations + state.margins
                raised = (state.multipliers + ASCENT * state.stiffness * aim).clamp_min(0)
                over = torch.where(violations > 0, state.over + 1, 0)
                raised = torch.where(over > STREAK, GROWTH * raised, raised)
                margins = torch.maximum(aim, FADING * state.margins).clamp_min(0)
                state = replace(state, multipliers=raised, margins=margins, over=over)
            adam = adam_step(state.adam, clipped(slope + gradient, settings.grad_clip), state.lr)
            projected = job.parameters.project(adam.theta, max_norm, settings.max_affine_norm)
            run.state = replace(run.state, constrained=replace(state, adam=replace(adam, theta=projected)))
            checkpoint.write_sometimes(run)
    except KeyboardInterrupt:
        if not settings.keep_on_interrupt:
            raise
        stopped, seen = "interrupted", run.state.constrained
    assert seen is not None
    best = seen.best
    assert best.losses is not None
    if not best.step and seen.step >= PATIENCE and stopped != "interrupted":
        _log.warning(
            "The output-constrained phase found no better vector that keeps every loss, in %d steps; what it began "
            "with is returned. Try a smaller output_constr_lr (it was %g, at the end %.2g) or more steps.",
            seen.step,
            settings.output_constr_lr or settings.lr,
            seen.lr,
        )
    return replace(
        outcome,
        theta=best.theta,
        losses=best.losses,
        constrained_steps=seen.step,
        constrained_stopped=stopped,
    )


def _cost(job: Job, outcome: Outcome) -> tuple[Cost, float | None]:
    """What is minimised, and the largest norm that v may have."""
    settings, parameters = job.settings, job.parameters
    if settings.custom_output_constr_loss_func is not None:
        longest = settings.output_constr_norm_initial_scale * float(parameters.norm(outcome.theta))
        return CustomCost(job, outcome.theta), min(longest, settings.max_norm or longest)

    def size(theta: Tensor) -> tuple[float, Tensor]:
        with torch.enable_grad():
            leaf = theta.detach().requires_grad_()
            value = parameters.size_of_effect(leaf)
        (slope,) = torch.autograd.grad(value, leaf)
        return float(value.detach()), slope

    return size, settings.max_norm


def _lagrangian(state: ConstrainState, bounds: Tensor) -> Objective:
    """The losses' weights max(0, λ + c·g); before the first step 1, to see how large their gradient is."""
    multipliers = state.multipliers
    if multipliers is None:
        return plain_sum

    def weights(losses: Tensor, completions: Tensor) -> Tensor:
        own, bound = multipliers.to(losses)[completions], (bounds - state.margins).to(losses)[completions]
        return (own + state.stiffness * (losses - bound)).clamp_min(0)

    return weights


def _balanced(state: ConstrainState, slope: Tensor, gradient: Tensor, n: int) -> ConstrainState:
    """Multipliers to begin with, under which the losses' pull best cancels the cost's, and a stiffness to match.

    The stiffness is such that a violation as large as one step can make it doubles the losses' pull.
    """
    length = float(gradient.norm())
    if length == 0:
        return replace(state, multipliers=torch.zeros(n, dtype=torch.float64), stiffness=1.0)
    balance = max(0.0, -float(slope @ gradient) / length**2)
    scale = max(balance, float(slope.norm()) / length)
    stiffness = scale / (state.lr * math.sqrt(len(slope)) * length)
    return replace(state, multipliers=torch.full((n,), balance, dtype=torch.float64), stiffness=stiffness)


def _gained(state: ConstrainState) -> bool:
    """Whether the best vector is better than the first one by more than hardly."""
    return state.best.score < state.began - LEAST_GAIN * abs(state.began)


def _restarted(state: ConstrainState) -> ConstrainState:
    """The state back at the best vector, with shorter steps; multipliers that grew far from there are found anew."""
    return replace(
        state,
        adam=AdamState.start(state.best.theta),
        multipliers=None,
        margins=torch.zeros_like(state.margins),
        over=torch.zeros_like(state.over),
        stiffness=0.0,
        mark=state.best.score,
        waited=0,
        lr=SHARE * state.lr,
        earlier=state.step,
        restarts=state.restarts + 1,
    )


def _compared(state: ConstrainState, value: float, feasible: bool, losses: list[float]) -> ConstrainState:
    """The state with this vector as the best if it is, and one iteration more or less to wait.

    Any vector's lower cost is an improvement: the way to a feasible one leads past some that are not.
    """
    if not state.step:
        return replace(state, best=replace(state.best, score=value), began=value, mark=value)
    best, waited = state.best, state.waited + 1
    if feasible and value < best.score:
        if value < best.score - LEAST_GAIN * abs(best.score):
            waited = 0
        best = Best(value, state.adam.theta, state.step, losses)
    mark = state.mark
    if value < mark - LEAST_GAIN * abs(mark):
        mark, waited = value, 0
    return replace(state, best=best, mark=mark, waited=waited)
