"""What the output-constrained phase may minimise in place of the norm: a function of the user's, and MELBO's.

MELBO looks for the vector that changes later activations most: A. Mack and A. Turner, *Mechanistically Eliciting Latent
Behaviors in Language Models* (MELBO), 2024, www.lesswrong.com/posts/ioPnHKFyy4Cw2Gr2x.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ValidationError
from ..intervention import compute_dtype
from ..models import adapter_for
from .datapoints import TrainingDatapoint, completions_of
from .layout import Layout, LayoutSpec, StepPack
from .parameters import Parameters, Table
from .passes import Passes
from .problem import OptimizationJob, layer_indices

__all__ = ["CustomCost", "make_melbo_loss_funcs"]


class CustomCost:
    """A user's loss function as a cost of θ; its preparing function is called once, now.

    Args:
        job: whose functions these are.
        theta: where the phase starts.
    """

    def __init__(self, job: OptimizationJob, theta: Tensor) -> None:
        self._job = job
        prepare = job.settings.custom_output_constr_pre_loss_func
        self._kwargs: Mapping[str, Any] = {}
        if prepare is None:
            return
        kwargs = prepare(*self._arguments(job.parameters.vector(theta), job.parameters.factors(theta)))
        if not isinstance(kwargs, Mapping):
            raise ValidationError(
                "custom_output_constr_pre_loss_func must return a dict of keyword arguments for "
                f"custom_output_constr_loss_func; it returned {type(kwargs).__name__}."
            )
        # The documented arguments tell nothing of the job's tokenizer and clamp, which MELBO's distance depends on.
        self._kwargs = {
            name: value.for_job(job) if isinstance(value, _Distance) else value
            for name, value in kwargs.items()
        }

    def _arguments(self, vector: Tensor, factors: tuple[Tensor, Tensor] | None) -> tuple[Any, ...]:
        job = self._job
        left, right = (None, None) if factors is None else factors
        only_prompt = job.settings.only_hook_prompt
        return job.adapter.model, job.datapoints, job.layer, vector, left, right, only_prompt

    def __call__(self, theta: Tensor) -> tuple[float, Tensor]:
        """The cost and its gradient [n].

        A function that has called backward() itself may return a number; else what it returns is differentiated.
        """
        job = self._job
        function = job.settings.custom_output_constr_loss_func
        assert function is not None
        with torch.enable_grad():
            vector = job.parameters.vector(theta).detach().clone().requires_grad_()
            factors = job.parameters.factors(theta)
            if factors is not None:
                factors = tuple(f.detach().clone().requires_grad_() for f in factors)  # type: ignore[assignment]
            leaves = [vector, *(factors or ())]
            cost = function(*self._arguments(vector, factors), **self._kwargs)
        if isinstance(cost, Tensor) and cost.requires_grad:
            if cost.numel() != 1:
                raise ValidationError(
                    f"custom_output_constr_loss_func must return a scalar; got a tensor {list(cost.shape)}."
                )
            slopes = torch.autograd.grad(cost.reshape(()), leaves, allow_unused=True)
        else:
            slopes = tuple(leaf.grad for leaf in leaves)
        if all(slope is None for slope in slopes):
            raise ValidationError(
                "custom_output_constr_loss_func returned what doesn't depend on the vector: return a scalar tensor "
                "computed from it, or call backward() inside and return a number."
            )
        made = [torch.zeros_like(leaf) if s is None else s for leaf, s in zip(leaves, slopes, strict=True)]
        gradient = torch.cat([slope.flatten() for slope in made])
        return float(cost.detach() if isinstance(cost, Tensor) else cost), gradient.to(theta)


def make_melbo_loss_funcs(target_layer: int) -> tuple[Callable[..., dict[str, Any]], Callable[..., Tensor]]:
    """Loss functions for MELBO, to be used in the output-constrained phase of ``optimize_vector``.

    The loss is minus the Euclidean distance between the steered and the unsteered residual stream entering
    ``target_layer``: its mean over each completion's positions from the last prompt token on, summed over the
    completions. ``vector_clamp``, ``affine_rank``, ``is_negative`` and token masks are honoured. For Hugging Face and
    TransformerLens models (www.lesswrong.com/posts/ioPnHKFyy4Cw2Gr2x).

    Args:
        target_layer: where the distance is measured, above the lowest steered layer; negatives count from the end,
            and n of n layers is the stream that leaves the last block.

    Returns:
        (melbo_pre_loss_func, melbo_loss_func), to be passed to ``optimize_vector`` as
        ``custom_output_constr_pre_loss_func`` and ``custom_output_constr_loss_func``. Called without what the first one
        returned, the second knows of no clamp and takes the model's own tokenizer.

    Raises:
        ValidationError: when called, where ``target_layer`` is not above the lowest steered layer.
    """

    def melbo_pre_loss_func(
        model: nn.Module,
        datapoints: Sequence[TrainingDatapoint],
        layer: int | Sequence[int],
        vector: Tensor,
        matrix_left: Tensor | None,
        matrix_right: Tensor | None,
        only_hook_prompt: bool,
    ) -> dict[str, Any]:
        rank = 0 if matrix_left is None else matrix_left.shape[0]
        return {"distance": _Distance(model, datapoints, layer, rank, only_hook_prompt, target_layer)}

    def melbo_loss_func(
        model: nn.Module,
        datapoints: Sequence[TrainingDatapoint],
        layer: int | Sequence[int],
        vector: Tensor,
        matrix_left: Tensor | None,
        matrix_right: Tensor | None,
        only_hook_prompt: bool,
        *,
        distance: Callable[..., Tensor] | None = None,
    ) -> Tensor:
        given = (model, datapoints, layer, vector, matrix_left, matrix_right, only_hook_prompt)
        if distance is None:
            distance = melbo_pre_loss_func(*given)["distance"]
        return -distance(vector, matrix_left, matrix_right)

    return melbo_pre_loss_func, melbo_loss_func


@dataclass(frozen=True, eq=False)
class _Distance:
    """Distance at a layer between steered and unsteered activations, as a function of the steering parameters.

    Args:
        model, datapoints, layer, rank, only_prompt: what is steered, and on what.
        target_layer: where the distance is measured.
        tokenizer: of the datapoints; None for the model's.
        clamp: as in :class:`.parameters.Parameters`.
    """

    model: nn.Module
    datapoints: Sequence[TrainingDatapoint]
    layer: int | Sequence[int]
    rank: int
    only_prompt: bool
    target_layer: int
    tokenizer: Any = None
    clamp: float | None = None

    def __post_init__(self) -> None:
        if self._target <= self._layers[0]:
            raise ValidationError(
                f"MELBO measures at layer {self._target}, but steering begins at layer {self._layers[0]} and changes "
                "nothing there yet; name a higher target_layer."
            )

    def for_job(self, job: OptimizationJob) -> _Distance:
        """The same with what a job knows of its datapoints and edits."""
        return replace(self, tokenizer=job.tokenizer, clamp=job.settings.vector_clamp)

    @cached_property
    def _target(self) -> int:
        return adapter_for(self.model).layer_index(self.target_layer)

    @cached_property
    def _layers(self) -> tuple[int, ...]:
        return layer_indices(adapter_for(self.model), self.layer)

    @cached_property
    def _passes(self) -> Passes:
        return Passes(adapter_for(self.model), [self._layers], 1)

    @cached_property
    def _layout(self) -> Layout:
        adapter = adapter_for(self.model)
        tokenizer = adapter.tokenizer if self.tokenizer is None else self.tokenizer
        completions = completions_of(self.datapoints, tokenizer, only_prompt=self.only_prompt)
        return Layout(adapter, LayoutSpec(tuple(completions), self.only_prompt, to_the_end=True))

    @cached_property
    def _unsteered(self) -> list[Tensor]:
        with torch.no_grad():
            return [self._measured(step_pack, None) for step_pack in self._layout.packs]

    def _measured(self, step_pack: StepPack, table: Table | None) -> Tensor:
        """[M, d_model] the activations at the end of every completion's prompt and at its own tokens."""
        hidden = self._passes.residual(step_pack, self._layers, table, self._target)
        pack, width = step_pack.pack, hidden.shape[1]
        ends = (pack.row * width + pack.predictor)[_ends(step_pack)]
        places = torch.cat([ends, pack.row * width + pack.column]).to(hidden.device)
        chosen = hidden.flatten(0, 1).index_select(0, places)
        return chosen.to(compute_dtype(chosen.dtype))

    def __call__(self, vector: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
        factors = None if left is None or right is None else (left, right)
        parameters = Parameters(vector.shape[-1], self.rank, self.clamp)
        table = parameters.table(parameters.join(vector, factors), self._layout.signs)
        total = vector.new_zeros(())
        with self._passes:
            for step_pack, before in zip(self._layout.packs, self._unsteered, strict=True):
                distances = (self._measured(step_pack, table) - before).norm(dim=-1)
                total = total + (_shares(step_pack).to(distances) * distances).sum().to(total)
        return total


def _ends(step_pack: StepPack) -> Tensor:
    """[N] bool: the first scored token of every completion, which the end of its prompt predicts."""
    pair = step_pack.pack.pair
    first = torch.ones_like(pair, dtype=torch.bool)
    first[1:] = pair[1:] != pair[:-1]
    return first


def _shares(step_pack: StepPack) -> Tensor:
    """[M] 1/(measured positions of the completion), for every measured position."""
    pair = step_pack.pack.pair
    owners = torch.cat([pair[_ends(step_pack)], pair])
    return 1 / owners.bincount()[owners]
