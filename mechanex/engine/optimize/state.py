"""What a running optimization knows: immutable between two steps, so that an interrupt never leaves half a step."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .objective import Counters
from .parameters import AdamState
from .problem import Epoch, OptimizationJob

__all__ = ["Best", "ConstrainState", "Outcome", "Run", "State"]


@dataclass(frozen=True, eq=False)
class Best:
    """A vector and how good it is.

    Attributes:
        score: lower is better.
        theta: its θ.
        step: after which it was found.
        losses: of all completions; None where a minibatch saw only some.
    """

    score: float
    theta: Tensor
    step: int
    losses: list[float] | None


@dataclass(frozen=True, eq=False)
class Outcome:
    """What an optimization found.

    Attributes:
        theta: θ of the vector that is returned.
        losses: of all completions, for that vector.
        steps: that were taken.
        stopped: why it ended.
        constrained_steps: of the output-constrained phase; None without one.
        constrained_stopped: why that phase ended.
    """

    theta: Tensor
    losses: list[float]
    steps: int
    stopped: str
    constrained_steps: int | None = None
    constrained_stopped: str | None = None


@dataclass(frozen=True, eq=False)
class ConstrainState:
    """All that the output-constrained phase knows between two steps.

    Attributes:
        outcome: of the first phase.
        adam: θ and the optimizer's means.
        multipliers: [n] of the constraints; None before the first step.
        margins: [n] how far below its bound each loss is aimed.
        over: [n] for how many iterations each loss has been above its bound.
        stiffness: of the penalty on violated constraints.
        best: the best feasible vector.
        began: the cost at the start.
        mark: the value that the next improvement is measured from.
        waited: iterations since the last improvement.
        lr: the learning rate.
        earlier: steps taken before the last restart.
        restarts: with a lower learning rate.
    """

    outcome: Outcome
    adam: AdamState
    multipliers: Tensor | None
    margins: Tensor
    over: Tensor
    stiffness: float
    best: Best
    began: float
    mark: float
    waited: int
    lr: float
    earlier: int = 0
    restarts: int = 0

    @property
    def step(self) -> int:
        """Steps taken in this phase."""
        return self.earlier + self.adam.step


@dataclass(frozen=True, eq=False)
class State:
    """All that an optimization knows between two steps.

    Attributes:
        adam: θ and the optimizer's means.
        counters: of the stopping tests.
        epoch: losses of the epoch that is running, in minibatches.
        best: the best vector so far.
        best_eval: the best one by the evaluation set.
        stale: evaluations since ``best_eval``.
        constrained: of the second phase, once it began.
    """

    adam: AdamState
    counters: Counters = field(default_factory=Counters)
    epoch: Epoch = field(default_factory=Epoch)
    best: Best | None = None
    best_eval: Best | None = None
    stale: int = 0
    constrained: ConstrainState | None = None


@dataclass(eq=False)
class Run:
    """A job that runs.

    Attributes:
        job: what is optimized.
        state: as of the last whole step; what a checkpoint holds.
        loss: as it was last reported.
        start: the loss at the start, as ``info`` shows losses.
        shown: the loss after each step.
        vectors: the vector after each step.
        evals: the loss of the evaluation set, at the start and after each step.
    """

    job: OptimizationJob
    state: State
    loss: float = math.nan
    start: Any = None
    shown: list[Any] = field(default_factory=list)
    vectors: list[Tensor] = field(default_factory=list)
    evals: list[float] = field(default_factory=list)

    def record(self, step: int, shown: Any, theta: Tensor) -> None:
        """Notes the loss and vector after ``step`` steps; a resumed run notes its last one again."""
        settings = self.job.settings
        if not step:
            self.start = shown
            return
        if settings.return_loss_history:
            self.shown[step - 1 :] = [shown]
        if settings.return_vec_history:
            self.vectors[step - 1 :] = [self.job.parameters.vector(theta).clone()]
