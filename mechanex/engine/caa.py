"""Contrastive activation addition: steering vectors as mean differences of the residual stream over answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import ValidationError
from .forward import packs_for
from .intervention import compute_dtype, widest
from .models import adapter_for
from .models.adapter import ModelAdapter, exclusive, undisturbed
from .pack import ROW_TOKENS, Pack
from .passes import visit_residuals
from .provenance import FIT, figures
from .ranks import current_ranks, dealt
from .text import Prompt, encode_pair
from .vectors import SteeringVector

__all__ = ["ROUNDING", "caa_vectors", "check_examples", "default_layer"]

# One text at two places of a batch differs by a few float32 roundings; a difference that small is none.
ROUNDING = 16 * torch.finfo(torch.float32).eps


def default_layer(n_layers: int) -> int:
    """The layer that is steered when none is named: two thirds of the way up."""
    return int(2 * n_layers / 3)


def caa_vectors(
    model: nn.Module | ModelAdapter,
    prompts: Sequence[Prompt],
    positive_answers: Sequence[str],
    negative_answers: Sequence[str],
    layers: Sequence[int] | None = None,
    tokenizer: Any = None,
    *,
    row_tokens: int = ROW_TOKENS,
    batch_tokens: int | None = None,
    progress: bool = False,
    tokens: Literal["all", "last"] = "all",
) -> SteeringVector:
    """One vector per layer: the mean over examples of (mean over the positive answer's tokens − the negative answer's).

    All layers are read in one pass over packed prompts, and only means are kept (arXiv:2312.06681, with
    means over all answer tokens).

    Args:
        model: a Hugging Face or TransformerLens model.
        prompts: text, token ids or chat messages, one per example.
        positive_answers: answers that show the behaviour.
        negative_answers: answers that show its opposite.
        layers: layers to read, negatives from the end; None for one, two thirds of the way up.
        tokenizer: needed for text when the model carries none.
        row_tokens: packed rows are filled up to this length.
        batch_tokens: most tokens in one pass; None for what suits the device.
        progress: show a progress bar.
        tokens: of an answer, ``"all"`` or the ``"last"`` one alone.

    Returns:
        A vector in float32 (float64 for float64 models) on the CPU.

    Raises:
        ValidationError: lists of unequal length or empty, an empty answer, a layer that doesn't exist, other tokens
            than these, or a result that is zero or not finite.
    """
    if tokens not in ("all", "last"):
        raise ValidationError(f"tokens is 'all' or 'last'; got {tokens!r}.")
    adapter = adapter_for(model)
    indices = check_examples(adapter, prompts, positive_answers, negative_answers, layers)
    n = len(prompts)
    tokenizer = tokenizer if tokenizer is not None else adapter.tokenizer
    answers = (positive_answers, negative_answers)
    pairs = [encode_pair(tokenizer, prompt, side[i]) for i, prompt in enumerate(prompts) for side in answers]
    if tokens == "last":
        pairs = [([*prompt, *answer[:-1]], answer[-1:]) for prompt, answer in pairs]
    weights = torch.tensor([(-1.0) ** i / (n * len(completion)) for i, (_, completion) in enumerate(pairs)])

    sums: dict[int, Tensor] = {}
    sizes: dict[int, Tensor] = {}  # mean norm of the activations, what rounding is relative to

    def reader(layer: int, pack: Pack, weight: Tensor) -> Callable[[Tensor], None]:
        def read(hidden: Tensor) -> None:
            tokens = pack.tokens_of(hidden).to(compute_dtype(hidden.dtype))
            weighted = weight.to(tokens)
            wide = widest(tokens.device)
            part, size = (weighted @ tokens).to(wide), (weighted.abs() @ tokens.norm(dim=1) / 2).to(wide)
            # Sums stay on the device: nothing waits for it between batches.
            sums[layer] = sums[layer] + part if layer in sums else part
            sizes[layer] = sizes[layer] + size if layer in sizes else size

        return read

    ranks = current_ranks(adapter)
    with exclusive(adapter), torch.no_grad(), undisturbed(adapter.hf_model), ranks.together():
        packs = packs_for(
            adapter, pairs, row_tokens=row_tokens, batch_tokens=batch_tokens, processes=ranks.sharing
        )
        for pack in dealt(packs, ranks, "CAA", progress=progress):
            weight = weights.to(pack.pair.device)[pack.pair]
            visit_residuals(adapter, pack, {layer: reader(layer, pack, weight) for layer in indices})
    nothing = torch.zeros(adapter.d_model, dtype=torch.float64)
    for layer in indices:
        sums[layer] = ranks.total(sums.get(layer, nothing))
        sizes[layer] = ranks.total(sizes.get(layer, nothing[0]))
    for layer in indices:
        _check_direction(layer, float(sums[layer].norm()), float(sizes[layer]))
    vectors = {layer: sums[layer].cpu().to(compute_dtype(adapter.dtype)) for layer in indices}
    fit = {n: {"of_stream": float(sums[n].norm()) / float(sizes[n])} for n in indices}
    return SteeringVector(
        vectors,
        model=adapter.model_id,
        model_family=adapter.family,
        method="caa",
        metadata={FIT: figures(fit)},
    )


def check_examples(
    adapter: ModelAdapter,
    prompts: Sequence[Prompt],
    positive_answers: Sequence[str],
    negative_answers: Sequence[str],
    layers: Sequence[int] | None,
) -> list[int]:
    """The layers that are meant, in order, once lists of contrastive examples are found to belong together.

    Raises:
        ValidationError: lists of unequal length or empty, or a layer that doesn't exist.
    """
    if any(isinstance(texts, str) for texts in (prompts, positive_answers, negative_answers)):
        raise ValidationError("prompts and answers are lists, one entry per example; got a single text.")
    n = len(prompts)
    if not n == len(positive_answers) == len(negative_answers):
        raise ValidationError(
            f"prompts, positive_answers and negative_answers must be of one length; "
            f"got {n}, {len(positive_answers)} and {len(negative_answers)}."
        )
    if n == 0:
        raise ValidationError("There are no examples: prompts and answers are empty.")
    if layers is None:
        layers = [default_layer(adapter.n_layers)]
    return adapter.layer_indices(layers)


def _check_direction(layer: int, norm: float, size: float) -> None:
    """Refuses a mean difference that is not finite, or zero to rounding of activations of norm ``size``."""
    if not math.isfinite(norm):
        reason = "not finite"
    elif norm <= ROUNDING * size:
        reason = "zero: the positive and negative answers do not differ there"
    else:
        return
    raise ValidationError(f"The vector at layer {layer} is {reason}; check the examples and the model.")
