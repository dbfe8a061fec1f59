"""Directions that tell contrastive answers apart: their principal difference, and a linear probe's.

Both are unit directions û of the residual stream, times the distance between the two classes' means along û: so at
strength 1 a vector moves the mean of the negative answers to that of the positive ones, as a CAA vector does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ValidationError
from .caa import ROUNDING, check_examples
from .forward import packs_for
from .models import adapter_for
from .models.adapter import ModelAdapter, exclusive, undisturbed
from .pack import Pack
from .passes import visit_residuals
from .provenance import FIT, figures
from .ranks import current_ranks, dealt
from .text import Prompt, encode_pairs
from .vectors import SteeringVector

__all__ = ["answer_means", "pca_vectors", "probe_vectors"]

# Weight of the probe's penalty beside the sum of its losses, for activations of unit mean square: scikit-learn's
# default.
PENALTY = 1.0
NEWTON_STEPS = 50


def pca_vectors(
    model: nn.Module | ModelAdapter,
    prompts: Sequence[Prompt],
    positive_answers: Sequence[str],
    negative_answers: Sequence[str],
    layers: Sequence[int] | None = None,
    tokenizer: Any = None,
    *,
    batch_tokens: int | None = None,
    progress: bool = False,
) -> SteeringVector:
    """The principal direction of the differences between paired answers, signed so that positive answers lie along it.

    Activations are means over an answer's tokens. Differences are taken both ways round, so their mean is zero and no
    centring removes what the pairs have in common (A. Zou et al., *Representation Engineering*, arXiv:2310.01405,
    section 3.1).

    Args:
        model, prompts, positive_answers, negative_answers, layers, tokenizer, batch_tokens, progress: as in
            :func:`.caa.caa_vectors`.

    Raises:
        ValidationError: as there; or the classes do not differ along the principal direction.
    """

    def direction(positive: Tensor, negative: Tensor) -> Tensor:
        return _principal(positive - negative)

    return _vectors(
        "pca",
        direction,
        model,
        (prompts, positive_answers, negative_answers),
        layers,
        tokenizer,
        batch_tokens,
        progress,
    )


def probe_vectors(
    model: nn.Module | ModelAdapter,
    prompts: Sequence[Prompt],
    positive_answers: Sequence[str],
    negative_answers: Sequence[str],
    layers: Sequence[int] | None = None,
    tokenizer: Any = None,
    *,
    batch_tokens: int | None = None,
    progress: bool = False,
) -> SteeringVector:
    """The direction of a logistic regression that tells positive answers from negative ones.

    Activations are means over an answer's tokens. The probe has an L2 penalty and an intercept (K. Li et al.,
    *Inference-Time Intervention*, arXiv:2306.03341, which steers along such directions).

    Args:
        model, prompts, positive_answers, negative_answers, layers, tokenizer, batch_tokens, progress: as in
            :func:`.caa.caa_vectors`.

    Raises:
        ValidationError: as there.
    """
    return _vectors(
        "probe",
        _logistic,
        model,
        (prompts, positive_answers, negative_answers),
        layers,
        tokenizer,
        batch_tokens,
        progress,
    )


def answer_means(
    adapter: ModelAdapter,
    pairs: Sequence[tuple[list[int], list[int]]],
    layers: Sequence[int],
    *,
    batch_tokens: int | None = None,
    progress: bool = False,
) -> dict[int, Tensor]:
    """[n, d_model] float64 on the CPU for every layer: the residual stream's mean over each completion's tokens.

    Args:
        adapter: the model; steering that is applied to it is seen.
        pairs: n (prompt ids, completion ids).
        layers: layers to read.
        batch_tokens: most tokens in one pass; None for what suits the device.
        progress: show a progress bar.
    """
    found = {layer: torch.zeros(len(pairs), adapter.d_model, dtype=torch.float64) for layer in layers}
    sizes = torch.tensor([len(completion) for _, completion in pairs], dtype=torch.float64)

    def reader(layer: int, pack: Pack) -> Callable[[Tensor], None]:
        def read(hidden: Tensor) -> None:
            tokens = pack.tokens_of(hidden).cpu().double()
            found[layer].index_add_(0, pack.pair.cpu(), tokens)

        return read

    ranks = current_ranks(adapter)
    with exclusive(adapter), torch.no_grad(), undisturbed(adapter.hf_model), ranks.together():
        packs = packs_for(adapter, pairs, batch_tokens=batch_tokens, processes=ranks.sharing)
        for pack in dealt(packs, ranks, "Activations", progress=progress):
            visit_residuals(adapter, pack, {layer: reader(layer, pack) for layer in layers})
    return {layer: ranks.total(sums) / sizes[:, None] for layer, sums in found.items()}


def _vectors(
    method: str,
    direction: Callable[[Tensor, Tensor], Tensor],
    model: nn.Module | ModelAdapter,
    examples: tuple[Sequence[Prompt], Sequence[str], Sequence[str]],
    layers: Sequence[int] | None,
    tokenizer: Any,
    batch_tokens: int | None,
    progress: bool,
) -> SteeringVector:
    adapter = adapter_for(model)
    indices = check_examples(adapter, *examples, layers)
    tokenizer = tokenizer if tokenizer is not None else adapter.tokenizer
    prompts, *sides = examples
    pairs = encode_pairs(tokenizer, [(p, a) for side in sides for p, a in zip(prompts, side, strict=True)])
    means = answer_means(adapter, pairs, indices, batch_tokens=batch_tokens, progress=progress)
    dtype = torch.float64 if adapter.dtype == torch.float64 else torch.float32
    vectors, fit = {}, {}
    for layer, found in means.items():
        positive, negative = found.chunk(2)
        _check(layer, positive, negative)
        vector = _scaled(layer, direction(positive, negative), positive, negative)
        # How many of the pairs lie along it: 1 where it tells every one, 0.5 where it tells nothing.
        fit[layer] = {"pairs_apart": float(((positive - negative) @ vector > 0).double().mean())}
        vectors[layer] = vector.to(dtype)
    return SteeringVector(
        vectors,
        model=adapter.model_id,
        model_family=adapter.family,
        method=method,
        metadata={FIT: figures(fit)},
    )


def _check(layer: int, positive: Tensor, negative: Tensor) -> None:
    """Refuses activations that are not finite, or the same for both classes up to rounding."""
    difference, size = (
        (positive - negative).norm(dim=1).max(),
        torch.cat([positive, negative]).norm(dim=1).mean(),
    )
    if not bool(torch.isfinite(difference)):
        reason = "not finite; check the model"
    elif float(difference) <= ROUNDING * float(size):
        reason = "the same for positive and negative answers; check the examples"
    else:
        return
    raise ValidationError(f"The activations at layer {layer} are {reason}.")


def _scaled(layer: int, direction: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """û turned towards the positive class, times the distance of the classes' means along it."""
    gap = positive.mean(0) - negative.mean(0)
    distance = float(gap @ direction)
    if abs(distance) <= ROUNDING * float(positive.norm(dim=1).mean()):
        raise ValidationError(
            f"The vector at layer {layer} is zero: on average the positive and negative answers do not differ along "
            "the direction that was found; check the examples."
        )
    return distance * direction


def _principal(differences: Tensor) -> Tensor:
    """[d] first right singular vector of [n, d]."""
    direction: Tensor = torch.linalg.svd(differences, full_matrices=False).Vh[0]
    return direction


def _logistic(positive: Tensor, negative: Tensor) -> Tensor:
    """[d] unit normal of the plane that logistic regression puts between two classes [n, d], by Newton's method.

    The optimum lies in the span of the centred activations, so it is sought there: in at most 2n dimensions.
    """
    x = torch.cat([positive, negative])
    x = x - x.mean(0)
    scale = x.square().mean().sqrt()
    basis = torch.linalg.svd(x, full_matrices=False).Vh
    features = torch.cat([x @ basis.T / scale, x.new_ones(len(x), 1)], 1)
    labels = torch.cat([x.new_ones(len(positive)), x.new_zeros(len(negative))])
    penalty = torch.full((features.shape[1],), PENALTY, dtype=x.dtype)
    penalty[-1] = 0  # the intercept's
    weights = torch.zeros_like(penalty)

    def loss(weights: Tensor) -> Tensor:
        logits = features @ weights
        return nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="sum") + (
            0.5 * (penalty * weights * weights).sum()
        )

    for _ in range(NEWTON_STEPS):
        p = (features @ weights).sigmoid()
        gradient = features.T @ (p - labels) + penalty * weights
        curvature = (features.T * (p * (1 - p))) @ features + torch.diag(penalty.clamp_min(1e-9))
        step = torch.linalg.solve(curvature, gradient)
        size = 1.0
        while size > 1e-6 and loss(weights - size * step) > loss(weights):
            size /= 2
        weights = weights - size * step
        if float(step.norm()) < 1e-10 * max(1.0, float(weights.norm())):
            break
    normal = weights[:-1] @ basis
    unit: Tensor = normal / normal.norm()
    return unit
