"""Contrastive activation addition: steering vectors as mean differences of the residual stream over answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..backends.arithmetic import without_autocast
from ..errors import ValidationError
from .forward import packs_for
from .intervention import compute_dtype, widest
from .models import adapter_for
from .models.adapter import ModelAdapter, exclusive, undisturbed
from .pack import ROW_TOKENS, Pack
from .passes import visit_residuals
from .provenance import FIT, figures
from .ranks import current_ranks, dealt
from .text import Prompt, encode_pairs
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
    pairs = encode_pairs(
        tokenizer, [(prompt, side[i]) for i, prompt in enumerate(prompts) for side in answers]
    )
    if tokens == "last":
        pairs = [([*prompt, *answer[:-1]], answer[-1:]) for prompt, answer in pairs]
    ranks, device, wide = current_ranks(adapter), adapter.device, widest(adapter.device)
    shares = [(-1.0) ** i / (n * len(completion)) for i, (_, completion) in enumerate(pairs)]
    weights = torch.tensor(shares, dtype=compute_dtype(adapter.dtype), device=device)
    totals = torch.zeros(len(indices), adapter.d_model + 1, dtype=wide, device=device)
    with exclusive(adapter), torch.no_grad(), undisturbed(adapter.hf_model), ranks.together():
        packs = packs_for(
            adapter, pairs, row_tokens=row_tokens, batch_tokens=batch_tokens, processes=ranks.sharing
        )
        for pack in dealt(packs, ranks, "CAA", progress=progress):
            # Sums stay on the device: nothing waits for it between batches.
            totals += _sums(adapter, pack, weights[pack.pair], indices)
    found = ranks.total(totals).cpu().to(torch.float64)
    norms, sizes = found[:, :-1].norm(dim=1).tolist(), found[:, -1].tolist()
    for layer, norm, size in zip(indices, norms, sizes, strict=True):
        _check_direction(layer, norm, size)
    vectors = dict(zip(indices, found[:, :-1].to(compute_dtype(adapter.dtype)), strict=True))
    fit = {n: {"of_stream": norm / size} for n, norm, size in zip(indices, norms, sizes, strict=True)}
    return SteeringVector(
        vectors,
        model=adapter.model_id,
        model_family=adapter.family,
        method="caa",
        metadata={FIT: figures(fit)},
    )


def _sums(adapter: ModelAdapter, pack: Pack, weight: Tensor, layers: Sequence[int]) -> Tensor:
    """[L, d_model + 1] of each layer the weighted sum of a pack's completion tokens [N]; last half that of their norms.

    That last number is the size of the activations, what rounding is relative to.
    """
    sums: list[Tensor] = []
    norms: list[Tensor] = []

    @without_autocast
    def read(hidden: Tensor) -> None:
        tokens = pack.tokens_of(hidden).to(compute_dtype(hidden.dtype))
        sums.append(weight.to(tokens) @ tokens)
        norms.append(tokens.norm(dim=1))

    visit_residuals(adapter, pack, dict.fromkeys(layers, read))
    device, wide = weight.device, widest(weight.device)
    # A model's layers may be on several devices.
    by_layer = torch.stack([found.to(device) for found in norms])
    sizes = (by_layer * weight.to(by_layer).abs()).sum(1) / 2
    return torch.cat([torch.stack([found.to(device) for found in sums]), sizes[:, None]], 1).to(wide)


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
