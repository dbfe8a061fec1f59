"""The output-constrained phase: the smallest vector that keeps every loss that was reached.

Minimises a cost f(θ), the norm or a function of the user's, subject to loss_i(θ) ≤ bound_i, by the modified
differential method of multipliers (J. Platt and A. Barr, *Constrained Differential Optimization*, NeurIPS 1987) in its
form for inequalities: θ goes along −∇f − Σ max(0, λ_i + c·g_i)·∇loss_i with g_i = loss_i − bound_i + margin_i, while
every multiplier λ_i rises with its g_i and never falls below 0. Losses swing around what they are held to, so each is
held to less than its bound, by a margin as wide as it has lately swung: then vectors that keep all bounds at once do
come by.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from .costs import CustomCost
from .objective import Objective, plain_sum
from .parameters import AdamState, Parameters, adam_step, clipped
from .passes import Evaluation, EvaluationRequest, Passes
from .state import Best, ConstrainState, Outcome, Run

__all__ = ["Constraint"]

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


class Constraint:
    """A run that looks for the best feasible vector, from its first phase's outcome on; asked as a Descent is.

    Attributes:
        seen: its state with what the evaluation of the current vector told. Only a whole iteration goes into the run's
            state: what goes on from there evaluates this vector again.
    """

    def __init__(self, run: Run, outcome: Outcome) -> None:
        job, settings = run.job, run.job.settings
        self.run = run
        self._cost, self._max_norm = _size(job.parameters), settings.max_norm
        if settings.custom_output_constr_loss_func is not None:
            longest = settings.output_constr_norm_initial_scale * float(job.parameters.norm(outcome.theta))
            self._cost, self._max_norm = (
                CustomCost(job, outcome.theta),
                min(longest, settings.max_norm or longest),
            )
        bounds = [loss + settings.eps * max(1.0, abs(loss)) for loss in outcome.losses]
        self._bounds = torch.tensor(bounds, dtype=torch.float64)
        if run.state.constrained is None:
            began = ConstrainState(
                outcome,
                AdamState.start(outcome.theta),
                multipliers=None,
                margins=torch.zeros_like(self._bounds),
                over=torch.zeros_like(self._bounds),
                stiffness=0.0,
                best=Best(math.inf, outcome.theta, 0, outcome.losses),
                began=math.inf,
                mark=math.inf,
                waited=0,
                lr=settings.output_constr_lr or settings.lr,
            )
            run.state = replace(run.state, constrained=began)
        self.seen = self._state

    @property
    def _state(self) -> ConstrainState:
        """As of the last whole iteration."""
        assert self.run.state.constrained is not None
        return self.run.state.constrained

    def request(self) -> EvaluationRequest:
        """The losses at the current vector, and the gradient of what holds them down."""
        return self.run.job.request(self._state.adam.theta, _lagrangian(self._state, self._bounds))

    def eval_request(self) -> None:
        """The evaluation set isn't watched here."""

    def judge(self, found: Evaluation, eval_losses: list[float] | None) -> str | None:
        """Why to stop at the current vector, or None."""
        value, self._slope = self._cost(self._state.adam.theta)
        if not found.finite or not math.isfinite(value):
            return "not finite"
        self._violations = torch.tensor(found.losses, dtype=torch.float64) - self._bounds
        feasible = bool((self._violations <= 0).all())
        self.seen = state = _compared(self._state, value, feasible, found.losses)
        most = self.run.job.settings.max_output_constr_iters
        if most is not None and state.step >= most:
            return "max_output_constr_iters"
        if state.waited >= PATIENCE:
            strayed = not feasible or value > state.best.score
            if _gained(state) or not strayed or state.restarts >= RESTARTS:
                return "converged"
        return None

    def noisy_requests(self, found: Evaluation) -> list[EvaluationRequest]:
        """There is no noise here."""
        return []

    def step(self, gradient: Tensor) -> None:
        """Goes on to the next vector, or back to the best one."""
        state, job, settings = self.seen, self.run.job, self.run.job.settings
        if state.waited >= PATIENCE:
            self.run.state = replace(self.run.state, constrained=_restarted(state))
            return
        if state.multipliers is None:
            state = _balanced(state, self._slope, gradient, len(self._bounds))
            assert state.multipliers is not None
            gradient = gradient * state.multipliers[0].to(gradient)
        else:
            aim = self._violations + state.margins
            raised = (state.multipliers + ASCENT * state.stiffness * aim).clamp_min(0)
            over = torch.where(self._violations > 0, state.over + 1, 0)
            raised = torch.where(over > STREAK, GROWTH * raised, raised)
            margins = torch.maximum(aim, FADING * state.margins).clamp_min(0)
            state = replace(state, multipliers=raised, margins=margins, over=over)
        adam = adam_step(state.adam, clipped(self._slope + gradient, settings.grad_clip), state.lr)
        projected = job.parameters.project(adam.theta, self._max_norm, settings.max_affine_norm)
        state = replace(state, adam=replace(adam, theta=projected))
        self.run.state = replace(self.run.state, constrained=state)

    def outcome(self, stopped: str, passes: Passes) -> Outcome:
        """The best feasible vector, and its losses."""
        seen = self._state if stopped == "interrupted" else self.seen
        best, settings = seen.best, self.run.job.settings
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
            seen.outcome,
            theta=best.theta,
            losses=best.losses,
            constrained_steps=seen.step,
            constrained_stopped=stopped,
        )


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


def _size(parameters: Parameters) -> Cost:
    """The norm of what steering adds, ‖v‖ + ‖M‖, as a cost."""

    def size(theta: Tensor) -> tuple[float, Tensor]:
        with torch.enable_grad():
            leaf = theta.detach().requires_grad_()
            value = parameters.size_of_effect(leaf)
        (slope,) = torch.autograd.grad(value, leaf)
        return float(value.detach()), slope

    return size
