"""MELBO: loss functions that look for the vector that changes later activations most.

A. Mack and A. Turner, *Mechanistically Eliciting Latent Behaviors in Language Models* (MELBO), 2024,
www.lesswrong.com/posts/ioPnHKFyy4Cw2Gr2x.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ValidationError
from ..intervention import compute_dtype
from ..models import adapter_for
from .custom import running_job
from .datapoints import TrainingDatapoint, completions_of
from .job import layer_indices
from .layout import Layout, LayoutSpec, StepPack
from .parameters import Parameters
from .passes import Passes

__all__ = ["make_melbo_loss_funcs"]


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
        ``custom_output_constr_pre_loss_func`` and ``custom_output_constr_loss_func``.

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


class _Distance:
    """Distance at a layer between steered and unsteered activations, as a function of the steering parameters."""

    def __init__(
        self,
        model: nn.Module,
        datapoints: Sequence[TrainingDatapoint],
        layer: int | Sequence[int],
        rank: int,
        only_prompt: bool,
        target_layer: int,
    ) -> None:
        adapter, job = adapter_for(model), running_job()
        self._layers, self._target = layer_indices(adapter, layer), adapter.layer_index(target_layer)
        if self._target <= self._layers[0]:
            raise ValidationError(
                f"MELBO measures at layer {self._target}, but steering begins at layer {self._layers[0]} and changes "
                "nothing there yet; name a higher target_layer."
            )
        tokenizer = adapter.tokenizer if job is None else job.tokenizer
        completions = completions_of(datapoints, tokenizer, only_prompt=only_prompt)
        clamp = None if job is None else job.settings.vector_clamp
        self._parameters = Parameters(adapter.d_model, rank, clamp)
        self._layout = Layout(adapter, LayoutSpec(tuple(completions), only_prompt, to_the_end=True))
        self._passes = Passes(adapter, self._layers, self._layers[:1], 1)
        self._unsteered = []
        with torch.no_grad(), self._passes:
            for step_pack in self._layout.packs:
                hidden = self._passes.residual(step_pack, self._layers, None, self._target)
                self._unsteered.append(_measured(hidden, step_pack))

    def __call__(self, vector: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
        factors = None if left is None or right is None else (left, right)
        table = self._parameters.table(self._parameters.join(vector, factors), self._layout.signs)
        total = vector.new_zeros(())
        with self._passes:
            for step_pack, before in zip(self._layout.packs, self._unsteered, strict=True):
                hidden = self._passes.residual(step_pack, self._layers, table, self._target)
                distances = (_measured(hidden, step_pack) - before).norm(dim=-1)
                total = total + (_shares(step_pack).to(distances) * distances).sum().to(total)
        return total


def _ends(step_pack: StepPack) -> Tensor:
    """[N] bool: the first scored token of every completion, which the end of its prompt predicts."""
    pair = step_pack.pack.pair
    first = torch.ones_like(pair, dtype=torch.bool)
    first[1:] = pair[1:] != pair[:-1]
    return first


def _measured(hidden: Tensor, step_pack: StepPack) -> Tensor:
    """[M, d_model] the activations at the end of every completion's prompt and at its own tokens."""
    pack, width = step_pack.pack, hidden.shape[1]
    ends = (pack.row * width + pack.predictor)[_ends(step_pack)]
    places = torch.cat([ends, pack.row * width + pack.column]).to(hidden.device)
    chosen = hidden.flatten(0, 1).index_select(0, places)
    return chosen.to(compute_dtype(chosen.dtype))


def _shares(step_pack: StepPack) -> Tensor:
    """[M] 1/(measured positions of the completion), for every measured position."""
    pair = step_pack.pack.pair
    owners = torch.cat([pair[_ends(step_pack)], pair])
    return 1 / owners.bincount()[owners]
