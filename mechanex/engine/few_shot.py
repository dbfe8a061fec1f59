"""Steering vectors for contrastive answers by optimization: positive answers made likely, negative ones unlikely."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ValidationError
from .caa import check_examples
from .forward import packs_for
from .models import adapter_for
from .models.adapter import ModelAdapter, exclusive, undisturbed
from .optimize.datapoints import TrainingDatapoint
from .optimize.loop import run_jobs
from .optimize.problem import OptimizationJob
from .optimize.settings import settings_of
from .pack import Pack
from .passes import visit_residuals
from .pauses import pause
from .provenance import FIT, figures
from .text import Prompt, encode_pair, encode_prompt
from .vectors import SteeringVector

__all__ = ["few_shot_vectors", "passes_over"]

# Of the residual stream's norm at the layer, so that one choice serves models of any scale; measured on mx-tiny.
STEP = 0.07
LONGEST = 0.5
STEPS = 25
# Examples of a step: more cost time and make the vectors no better on other prompts; measured there too.
EXAMPLES = 16
PLATEAU = 0.02


def passes_over(n_examples: int, n_layers: int) -> int:
    """How often an optimization by default reads its examples, at most, rounded up."""
    return n_layers * math.ceil(STEPS * min(1.0, EXAMPLES / max(n_examples, 1)))


def few_shot_vectors(
    model: nn.Module | ModelAdapter,
    prompts: Sequence[Prompt],
    positive_answers: Sequence[str],
    negative_answers: Sequence[str],
    layers: Sequence[int] | None = None,
    tokenizer: Any = None,
    *,
    seed: int = 0,
    progress: bool = False,
    **options: Any,
) -> SteeringVector:
    """One optimized vector per layer, all in one run: each steers by itself (several at once add up).

    Minimises Σ −log p(positive answer) + log p(negative answer) over the examples, with eps 0 (arXiv:2502.18862).
    Steps and the largest norm are set by the norm of the residual stream r at the layer: a step moves a vector by about
    0.07·‖r‖, and it grows to 0.5·‖r‖ at most. A step sees 16 examples, in turn; there are 25, or fewer where the loss
    reaches a plateau.

    Args:
        model: a Hugging Face or TransformerLens model.
        prompts: text, token ids or chat messages, one per example.
        positive_answers: answers that show the behaviour.
        negative_answers: answers that show its opposite.
        layers: negatives from the end; None for one, two thirds of the way up.
        tokenizer: needed for text when the model carries none.
        seed: of the starting vectors; it is recorded.
        progress: show a progress bar.
        options: of ``optimize_vector``, in place of those above; not ``affine_rank`` and ``vector_clamp``, whose
            steering is more than a vector.

    Returns:
        Vectors in float32 (float64 for float64 models) on the CPU.

    Raises:
        ValidationError: lists of unequal length or empty, an empty answer, a layer that doesn't exist, a bad option;
            answers that do not differ, or whose probabilities do not depend on the layer.
        TypeError: an option that doesn't exist.
    """
    adapter = adapter_for(model)
    indices = check_examples(adapter, prompts, positive_answers, negative_answers, layers)
    tokenizer = tokenizer if tokenizer is not None else adapter.tokenizer
    for name in ("affine_rank", "vector_clamp"):
        if options.get(name) is not None:
            raise ValidationError(
                f"{name} makes steering that a vector per layer can't hold; use optimize_vector for it."
            )
    _check_answers(tokenizer, prompts, positive_answers, negative_answers)
    datapoints = [
        TrainingDatapoint(prompt, [negative], [positive])
        for prompt, positive, negative in zip(prompts, positive_answers, negative_answers, strict=True)
    ]
    norms = _typical_norms(adapter, [encode_prompt(tokenizer, prompt) for prompt in prompts], indices)
    jobs = []
    for layer in indices:
        usual = {
            "eps": 0.0,
            "do_one_minus": False,
            "max_iters": STEPS,
            "plateau": PLATEAU,
            "lr": STEP * norms[layer] / math.sqrt(adapter.d_model),
            "max_norm": LONGEST * norms[layer],
        }
        settings = settings_of(**(usual | {"seed": seed} | options | {"return_info": True}))
        size = EXAMPLES if len(datapoints) > EXAMPLES else None
        jobs.append(OptimizationJob(adapter, datapoints, layer, settings, tokenizer, minibatch_size=size))
    found = run_jobs(jobs, progress=progress)
    for job, (vector, _) in zip(jobs, found, strict=True):
        _check_moved(job, vector)
    vectors = {layer: result[0].cpu() for layer, result in zip(indices, found, strict=True)}
    told = ("iters", "starting_loss", "loss", "stopped")
    fit = {
        layer: {name: result[-1][name] for name in told} for layer, result in zip(indices, found, strict=True)
    }
    return SteeringVector(
        vectors,
        model=adapter.model_id,
        model_family=adapter.family,
        method="few-shot",
        seed=seed,
        metadata={FIT: figures(fit)},
    )


def _check_answers(
    tokenizer: Any, prompts: Sequence[Prompt], positive: Sequence[str], negative: Sequence[str]
) -> None:
    """Refuses answers that cancel: then only rounding would say where the vector goes."""
    sides = []
    for answers in (positive, negative):
        pairs = (encode_pair(tokenizer, p, a) for p, a in zip(prompts, answers, strict=True))
        sides.append(Counter((tuple(prompt), tuple(answer)) for prompt, answer in pairs))
    if sides[0] == sides[1]:
        raise ValidationError("The answers are the same for positive and negative; check the examples.")


def _check_moved(job: OptimizationJob, vector: Tensor) -> None:
    """Refuses what is still the random start."""
    start = job.parameters.project(job.start(), job.settings.max_norm, None)
    if torch.allclose(vector, start, rtol=1e-6, atol=0):
        raise ValidationError(
            f"The vector at layer {job.layers[0]} stayed where it started: the answers' probabilities do not depend "
            "on it there, or the steps are too small; check the examples, the model and lr."
        )


def _typical_norms(adapter: ModelAdapter, prompts: list[list[int]], layers: list[int]) -> dict[int, float]:
    """The median norm of the residual stream over the last tokens of prompts; first tokens of texts are much longer."""
    seen: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    pairs = [(ids[:-1], ids[-1:]) if len(ids) > 1 else (ids, ids) for ids in prompts]
    with exclusive(adapter), torch.no_grad(), undisturbed(adapter.hf_model):
        for pack in packs_for(adapter, pairs):
            pause()

            def reader(layer: int, pack: Pack = pack) -> Any:
                def read(hidden: Tensor) -> None:
                    seen[layer].append(pack.tokens_of(hidden).float().norm(dim=-1).cpu())

                return read

            visit_residuals(adapter, pack, {layer: reader(layer) for layer in layers})
    norms = {layer: float(torch.cat(found).median()) for layer, found in seen.items()}
    for layer, norm in norms.items():
        if not math.isfinite(norm) or norm == 0:
            raise ValidationError(
                f"The activations at layer {layer} are zero or not finite; check the model."
            )
    return norms
