"""Conditions on prompts, fitted to examples: the direction, its layer, and a threshold for a false-positive rate."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ValidationError
from ..forward import packs_for
from ..given import as_list
from ..models import adapter_for
from ..models.adapter import ModelAdapter, exclusive, undisturbed
from ..pack import Pack
from ..passes import visit_residuals
from ..prompt_conditions import PromptCondition
from ..ranks import current_ranks, dealt
from ..text import Prompt, encode_prompt

__all__ = ["fit_condition", "prompt_means"]

_log = logging.getLogger(__name__)

_FEWEST = 8
_FOLDS = 5
_TELLS = 0.7  # AUROC on held-out prompts below which there is no condition to speak of
_MISSED = 0.02  # share of held-out prompts of its own kind that a threshold between the kinds may miss


def fit_condition(
    model: nn.Module | ModelAdapter,
    prompts: Sequence[Prompt],
    others: Sequence[Prompt],
    layers: Sequence[int] | None = None,
    tokenizer: Any = None,
    *,
    false_positives: float = 0.02,
) -> PromptCondition:
    """The condition that prompts of one kind meet and others don't.

    The direction is that of a linear discriminant of the prompts' mean normed residual streams. Layer, threshold and
    rates are told by prompts that the direction of their fold has not seen.

    Args:
        model: a Hugging Face or TransformerLens model.
        prompts: of the kind that is to be steered: text, token ids or chat messages, 8 or more.
        others: of every other kind that is to be left alone, as mixed as what will come, 8 or more.
        layers: candidates, negatives from the end; None for all.
        tokenizer: needed for text when the model carries none.
        false_positives: share of other prompts that may meet it.

    Raises:
        ValidationError: too few prompts, a rate outside of (0, 1), or a layer that doesn't exist.
    """
    adapter = adapter_for(model)
    if not 0 < false_positives < 1:
        raise ValidationError(f"false_positives is a share above 0 and below 1; got {false_positives!r}.")
    prompts, others = as_list("prompts", prompts, "prompts"), as_list("others", others, "prompts")
    for name, given in (("prompts", prompts), ("others", others)):
        if len(given) < _FEWEST:
            raise ValidationError(f"{name} is a list of {_FEWEST} prompts or more; got {len(given)}.")
    candidates = list(range(1, adapter.n_layers + 1)) if layers is None else adapter.layer_indices(layers)
    if math.floor((len(others) + 1) * false_positives) < 1:
        _log.warning(
            "%d other prompts can't show a false-positive rate of %g: the threshold lies above all of them; give %d",
            len(others),
            false_positives,
            math.ceil(1 / false_positives),
        )
    tokenizer = tokenizer if tokenizer is not None else adapter.tokenizer
    ids = [encode_prompt(tokenizer, prompt) for prompt in (*prompts, *others)]
    means = prompt_means(adapter, ids, candidates)
    own = torch.arange(len(ids)) < len(prompts)
    found = {layer: _held_out(means[layer], own) for layer in candidates}
    layer = max(candidates, key=lambda one: _separation(found[one], own))
    scores = found[layer]
    if (auroc := _separation(scores, own)[0]) < _TELLS:
        raise ValidationError(
            f"The prompts and the others look the same to the model: at the best layer, {layer}, held-out ones are "
            f"told apart with an AUROC of {auroc:.2f}. Give prompts that differ more, or more of them."
        )
    threshold = _threshold(scores[own], scores[~own], false_positives)
    return PromptCondition(
        layer,
        _discriminant(means[layer], own),
        threshold,
        false_positives=float((scores[~own] > threshold).double().mean()),
        true_positives=float((scores[own] > threshold).double().mean()),
    )


def prompt_means(
    adapter: ModelAdapter, ids: Sequence[Sequence[int]], layers: Sequence[int]
) -> dict[int, Tensor]:
    """Means [n_prompts, d_model] of x/‖x‖ over the prompts' tokens after their first, by layer, float64 on the CPU.

    Args:
        adapter: the model.
        ids: prompts of two tokens or more.
        layers: 0 … n_layers.

    Raises:
        ValidationError: a prompt of one token.
    """
    if short := [list(one) for one in ids if len(one) < 2]:
        raise ValidationError(
            f"a prompt to fit a condition to has two tokens or more; got the token ids {short[0]}."
        )
    sums = {layer: torch.zeros(len(ids), adapter.d_model, dtype=torch.float64) for layer in layers}

    def reader(layer: int, pack: Pack) -> Callable[[Tensor], None]:
        def read(hidden: Tensor) -> None:
            tokens = pack.tokens_of(hidden).float()
            norms = tokens.norm(dim=1, keepdim=True)
            unit = (tokens / norms.where(norms > 0, 1.0)).cpu().double()
            sums[layer].index_add_(0, pack.pair.cpu(), unit)

        return read

    ranks, pairs = current_ranks(adapter), [(list(one[:1]), list(one[1:])) for one in ids]
    with exclusive(adapter), torch.no_grad(), undisturbed(adapter.hf_model), ranks.together():
        for pack in dealt(packs_for(adapter, pairs, processes=ranks.sharing), ranks, "Prompts"):
            visit_residuals(adapter, pack, {layer: reader(layer, pack) for layer in layers})
    counts = torch.tensor([[float(len(one) - 1)] for one in ids], dtype=torch.float64)
    return {layer: ranks.total(total) / counts for layer, total in sums.items()}


def _discriminant(means: Tensor, own: Tensor) -> Tensor:
    """The direction [d] of norm 1 that tells rows ``own`` of ``means`` [n, d] from the others, covariance shrunk."""
    kinds = [means[own], means[~own]]
    gap = kinds[0].mean(0) - kinds[1].mean(0)
    rest = torch.cat([kind - kind.mean(0) for kind in kinds])
    n = rest.shape[0]
    gram = rest @ rest.T
    # Rows are few and wide: (restᵀ rest / n + ridge)⁻¹ gap, by the inverse of an [n, n] matrix.
    ridge = float(gram.diagonal().mean()) / n
    if ridge > 0:
        inside = gram + ridge * n * torch.eye(n, dtype=gram.dtype)
        gap = gap - rest.T @ torch.linalg.solve(inside, rest @ gap)
    direction: Tensor = gap / gap.norm().clamp(min=torch.finfo(gap.dtype).tiny)
    return direction


def _held_out(means: Tensor, own: Tensor) -> Tensor:
    """The score [n] of each prompt by a direction that was fitted without it."""
    scores = torch.zeros(len(own), dtype=torch.float64)
    place = torch.zeros(len(own), dtype=torch.long)
    for kind in (own, ~own):
        place[kind] = torch.arange(int(kind.sum())) % _FOLDS
    for fold in range(_FOLDS):
        left = place == fold
        scores[left] = means[left] @ _discriminant(means[~left], own[~left])
    return scores


def _separation(scores: Tensor, own: Tensor) -> tuple[float, float]:
    """AUROC, and where that is equal how many deviations the kinds lie apart."""
    ours, theirs = scores[own], scores[~own]
    above = (ours[:, None] > theirs).double() + 0.5 * (ours[:, None] == theirs).double()
    spread = float((ours.var() + theirs.var()).sqrt())
    return float(above.mean()), float(ours.mean() - theirs.mean()) / max(spread, 1e-12)


def _threshold(ours: Tensor, theirs: Tensor, false_positives: float) -> float:
    """A threshold that a share of ``theirs`` lies above at most; between the kinds where they lie apart."""
    over = math.floor((len(theirs) + 1) * false_positives)
    cut = float(theirs.sort(descending=True).values[min(over, len(theirs) - 1)])
    lowest = float(ours.sort().values[math.floor(len(ours) * _MISSED)])
    return (cut + lowest) / 2 if lowest > cut else cut
