"""One optimization: its datapoints, layers and options, checked and ready to run; what it asks of each step's pass."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ValidationError
from ..intervention import compute_dtype
from ..models import adapter_for
from ..models.adapter import ModelAdapter
from ..ranks import current_ranks
from ..whole import as_whole
from .datapoints import Completion, TrainingDatapoint, by_datapoint, completions_of
from .layout import LayoutSpec
from .objective import (
    Objective,
    Stopping,
    check_satisficing,
    counted,
    plain_sum,
    satisficing,
    seeded,
    target_of,
)
from .parameters import Parameters
from .passes import EvaluationRequest
from .settings import OptimizeSettings

__all__ = ["Epoch", "Minibatches", "OptimizationJob", "layer_indices"]


class OptimizationJob:
    """What is to be optimized.

    Args:
        model: a Hugging Face or TransformerLens model.
        datapoints: what on.
        layer: the layer or layers that are steered, negatives from the end.
        settings: the options.
        tokenizer: needed for text when the model carries none.
        minibatch_size: prompts of a step; None for all.

    Raises:
        ValidationError: bad datapoints, layers or options; names the datapoint.
    """

    def __init__(
        self,
        model: nn.Module | ModelAdapter,
        datapoints: Sequence[TrainingDatapoint],
        layer: int | Sequence[int],
        settings: OptimizeSettings,
        tokenizer: Any = None,
        *,
        minibatch_size: int | None = None,
    ) -> None:
        self.adapter = adapter = adapter_for(model)
        self.tokenizer = tokenizer if tokenizer is not None else adapter.tokenizer
        self.datapoints, self.layer, self.settings = datapoints, layer, settings
        self.layers = layer_indices(adapter, layer)
        only_prompt = settings.only_hook_prompt
        self.completions = completions_of(datapoints, self.tokenizer, only_prompt=only_prompt)
        self.stopping = Stopping(settings, self.completions)
        self.parameters = Parameters(adapter.d_model, settings.affine_rank or 0, settings.vector_clamp)
        self.start_vector = None
        if settings.starting_vec is not None:
            self.start_vector = self.parameters.check(settings.starting_vec)
        self.minibatch_size = as_whole(minibatch_size)
        if minibatch_size is not None and (self.minibatch_size is None or self.minibatch_size < 1):
            raise ValidationError(f"minibatch_size is a whole number of 1 or more; got {minibatch_size!r}.")
        self._draw_from(_seed(settings))
        self.spec = LayoutSpec(
            tuple(self.completions),
            only_prompt,
            settings.noisy,
            minibatch_size is not None,
            settings.batch_tokens,
        )
        self.eval_completions: list[Completion] = []
        self.eval_spec: LayoutSpec | None = None
        if settings.eval_datapoints is not None:
            self._prepare_eval(settings.eval_datapoints)

    def _prepare_eval(self, datapoints: Sequence[TrainingDatapoint]) -> None:
        only_prompt = self.settings.only_hook_prompt
        try:
            self.eval_completions = completions_of(datapoints, self.tokenizer, only_prompt=only_prompt)
            check_satisficing(self.settings, self.eval_completions)
        except ValidationError as error:
            raise ValidationError(f"eval_datapoints: {error.message}") from error
        self.eval_spec = LayoutSpec(
            tuple(self.eval_completions), only_prompt, batch_tokens=self.settings.batch_tokens
        )

    def _draw_from(self, seed: int) -> None:
        self.seed = seed
        self.minibatches: Minibatches | None = None
        if self.minibatch_size is not None:
            self.minibatches = Minibatches(self.completions, self.minibatch_size, seed)

    def with_seed(self, seed: int) -> OptimizationJob:
        """The same job with all its random draws from this seed."""
        job = copy.copy(self)
        job._draw_from(seed)
        return job

    @property
    def dtype(self) -> torch.dtype:
        """Of θ: float32, or float64 for float64 models."""
        return compute_dtype(self.adapter.dtype)

    def start(self) -> Tensor:
        """θ to begin with, on the model's device."""
        settings = self.settings
        generator = seeded(self.seed, "start")
        theta = self.parameters.start(
            self.start_vector, settings.starting_norm, settings.starting_affine_norm, generator
        )
        return theta.to(self.adapter.device, self.dtype)

    @property
    def objective(self) -> Objective:
        """What of the completions' losses a step minimises."""
        return satisficing(self.targets) if self.settings.satisfice else plain_sum

    @cached_property
    def targets(self) -> Tensor:
        """[n] target loss of every completion, NaN for none."""
        found = [target_of(c, self.settings) for c in self.completions]
        values = [math.nan if t is None else t for t in found]
        return torch.tensor(values, dtype=self.dtype, device=self.adapter.device)

    def request(self, theta: Tensor, objective: Objective | None = None) -> EvaluationRequest:
        """A request for the noise-free losses of all completions, and for the gradient of ``objective``."""
        options = self.settings.loss_options
        return EvaluationRequest(self.spec, self.layers, options, self.parameters, theta, objective)

    def step_request(self, theta: Tensor, step: int) -> EvaluationRequest:
        """The noise-free request that a step begins with: losses, and such gradients as it needs without noise."""
        objective: Objective | None = self.objective
        if self.settings.noisy:
            objective = plain_sum if self.settings.do_tangent_space_noise else None
        request = self.request(theta, objective)
        return self.sampled(replace(request, by_effect=self.settings.noisy and objective is not None), step)

    def sampled(self, request: EvaluationRequest, step: int) -> EvaluationRequest:
        """The request for the prompts of a step's minibatch only."""
        if self.minibatches is None:
            return request
        counts = self.minibatches.counts(step)
        times = torch.zeros(len(self.completions), dtype=self.dtype)
        times[list(counts)] = torch.tensor(list(counts.values()), dtype=self.dtype)
        objective = request.objective
        # A gradient of each completion's own loss counts it once.
        if objective is not None and not request.by_effect:
            objective = counted(objective, times.to(self.adapter.device))
        prompts = sorted({self.completions[i].datapoint for i in counts})
        return replace(request, objective=objective, prompts=tuple(prompts))

    def eval_request(self, theta: Tensor) -> EvaluationRequest | None:
        """A request for the losses of the evaluation set, where there is one."""
        return None if self.eval_spec is None else replace(self.request(theta), spec=self.eval_spec)

    def reported(self, losses: Sequence[float], step: int | None = None) -> float:
        """The loss that is told and tested: the sum, or in minibatches the mean per (prompt, completion).

        Args:
            losses: of all completions.
            step: only of its minibatch; None for all.
        """
        if self.minibatches is None:
            return _sum(losses)
        counts = dict.fromkeys(range(len(losses)), 1) if step is None else self.minibatches.counts(step)
        return _sum([losses[i] * n for i, n in counts.items()]) / sum(counts.values())

    def shown(self, losses: Sequence[float], step: int | None = None) -> Any:
        """Losses as ``info`` holds them: one number, or without ``do_target_loss_sum`` all by datapoint."""
        if self.settings.do_target_loss_sum:
            return self.reported(losses, step)
        return by_datapoint(self.completions, losses)

    def score(self, losses: Sequence[float], completions: Sequence[Completion]) -> float:
        """What the vectors of a run are compared by: the objective, lower is better."""
        if not self.settings.satisfice:
            return _sum(losses)
        pairs = zip(losses, completions, strict=True)
        return _sum([(loss - (target_of(c, self.settings) or 0.0)) ** 2 for loss, c in pairs])


def _seed(settings: OptimizeSettings) -> int:
    """The given seed, or one drawn from the given generator or torch's own."""
    if settings.seed is not None:
        return settings.seed
    generator = settings.generator or torch.default_generator
    drawn = int(torch.randint(2**31 - 1, (), generator=generator, device=generator.device))
    return current_ranks(None).from_first(lambda: drawn)


def _sum(losses: Sequence[float]) -> float:
    # fsum refuses to add infinities of both signs.
    return math.fsum(losses) if all(map(math.isfinite, losses)) else sum(losses)


def layer_indices(adapter: ModelAdapter, layer: int | Sequence[int]) -> tuple[int, ...]:
    """The layers that ``layer`` names, in order.

    Raises:
        ValidationError: none, one that doesn't exist, or one twice.
    """
    given: list[Any] = list(layer) if isinstance(layer, list | tuple | range) else [layer]
    if not given:
        raise ValidationError("There is no layer to steer: the list is empty; give a layer or several.")
    found = [adapter.layer_index(one) for one in given]
    if len(set(found)) < len(found):
        raise ValidationError(f"A layer is named twice in {given}: the vector is added once at each layer.")
    return tuple(sorted(found))


@dataclass(frozen=True)
class Epoch:
    """An epoch that isn't over yet: its number, and the losses so far, by completion."""

    number: int = 0
    losses: dict[int, float] = field(default_factory=dict)


class Minibatches:
    """Prompts in minibatches of one size, which may be any.

    The first epoch has the given order, later ones a random one of their own; a minibatch that an epoch doesn't fill
    goes on with the next epoch's prompts.

    Args:
        completions: of all prompts; a prompt is a datapoint.
        size: prompts of a minibatch.
        seed: of the orders.
    """

    def __init__(self, completions: Sequence[Completion], size: int, seed: int) -> None:
        self._size, self._seed, self._n_completions = size, seed, len(completions)
        self._completions: dict[int, list[int]] = {}
        for i, completion in enumerate(completions):
            self._completions.setdefault(completion.datapoint, []).append(i)
        self._n = len(self._completions)
        self._orders: dict[int, list[int]] = {}

    def prompts(self, step: int) -> list[tuple[int, int]]:
        """(epoch, prompt) for every place of a step's minibatch."""
        places = range(step * self._size, (step + 1) * self._size)
        return [(place // self._n, self._order(place // self._n)[place % self._n]) for place in places]

    def counts(self, step: int) -> dict[int, int]:
        """How often each completion of a step's minibatch is in it."""
        prompts = Counter(prompt for _, prompt in self.prompts(step))
        return {i: count for prompt, count in prompts.items() for i in self._completions[prompt]}

    def collect(self, epoch: Epoch, step: int, losses: Sequence[float]) -> tuple[list[float] | None, Epoch]:
        """The losses of the epoch that this step completes, or None, and the epoch that goes on.

        Where a step completes several, it is the last of them.

        Args:
            epoch: before the step.
            step: counted from 0.
            losses: of all completions; those of the step's minibatch are looked at.
        """
        done, number, seen = None, epoch.number, dict(epoch.losses)
        for which, prompt in self.prompts(step):
            if which != number:
                number, seen = which, {}
            seen.update((i, losses[i]) for i in self._completions[prompt])
            if len(seen) == self._n_completions:
                done = [seen[i] for i in range(self._n_completions)]
        return done, Epoch(number, seen)

    def _order(self, epoch: int) -> list[int]:
        if epoch not in self._orders:
            for old in [e for e in self._orders if e < epoch - 1]:
                del self._orders[old]
            order = list(range(self._n))
            if epoch:
                order = torch.randperm(self._n, generator=seeded(self._seed, "shuffle", epoch)).tolist()
            self._orders[epoch] = order
        return self._orders[epoch]
