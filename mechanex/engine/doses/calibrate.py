"""The strength at which a vector moves texts by a budget: the 95th percentile of KL(steered‖plain) per token."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ValidationError
from ..dose_record import FIELD, DoseRecord
from ..given import as_list, as_number
from ..models import adapter_for
from ..models.adapter import ModelAdapter
from ..pack import Pair
from ..sampling import Options
from ..text import Prompt, encode_pairs
from ..vectors import SteeringVector
from .forced import ForcedAnswers
from .questions import open_prompts
from .written import write

__all__ = ["PASSES", "calibrate", "dose_quantile", "plain_pairs", "with_record"]

_log = logging.getLogger(__name__)

PASSES = 6
TOLERANCE = 0.02
QUANTILE = 0.95
# First strengths, as shares of the stream's norm at the vector's layers.
SHARES = (0.06, 0.2)
# How KL grows with strength where little is known: as its square, while a dose is small.
POWER = 2.0
# Passes in which one strength is tried; where they didn't do, three share one.
SINGLE = 4
BESIDE = (0.97, 1.03)
FARTHEST = 16.0  # most that a strength is changed by at once


def calibrate(
    model: nn.Module | ModelAdapter,
    vector: SteeringVector | Mapping[int, Any],
    kl: float = 1.0,
    *,
    prompts: Sequence[Prompt] | None = None,
    answers: Sequence[str | Sequence[int]] | None = None,
    tokenizer: Any = None,
    max_tokens: int = 32,
    seed: int = 0,
) -> SteeringVector:
    """Finds the strength of a vector at which 95 % of tokens move by at most ``kl`` nats.

    Strengths are tried in packed passes over the plain model's answers, two in the first and at most six passes in all;
    between them the budget's strength is interpolated on logarithmic axes.

    Args:
        model: a Hugging Face or TransformerLens model.
        vector: what to calibrate, on its own terms (clamp, norm, rotation, tokens), or ``{layer: tensor}``;
            ``-vector`` is another one.
        kl: the budget in nats, above 0: the 95th percentile over the answers' tokens of KL(steered‖plain), from
            logits before temperature.
        prompts: what the answers answer; None for open questions.
        answers: one for each prompt; None for what the plain model writes.
        tokenizer: needed for text when the model carries none.
        max_tokens: most tokens of an answer that is written.
        seed: of the answers that are written.

    Returns:
        The same vector with the record ``calibration``: its ``strength`` is the calibrated dose, and ``seen`` all
        that was tried. A strength beyond is logged with what was seen nearest to it.

    Raises:
        ValidationError: a budget that no strength meets, a zero vector, or lists that don't belong together.
    """
    budget = as_number(kl)
    if budget is None or not 0 < budget < math.inf:
        raise ValidationError(f"kl is a budget in nats, above 0; got {kl!r}.")
    adapter = adapter_for(model)
    if not isinstance(vector, SteeringVector):
        vector = SteeringVector(vector)
    if not any(vector.norms().values()):
        raise ValidationError("the vector is zero: there is no strength to find.")
    vector = _uncalibrated(vector)
    vector.plan(adapter)
    tokenizer = tokenizer if tokenizer is not None else adapter.tokenizer
    forced = ForcedAnswers(adapter, plain_pairs(adapter, tokenizer, prompts, answers, max_tokens, seed))
    seen = search(forced, adapter, vector, budget)
    strength = min(seen, key=lambda one: abs(math.log(seen[one] / budget)))
    if abs(seen[strength] / budget - 1) > 0.05:
        raise ValidationError(
            f"no strength was found at which 95 % of tokens move by {budget:.3g} nats: "
            + ", ".join(f"{at:.3g} gives {moved:.3g}" for at, moved in sorted(seen.items()))
            + ". Give another budget, or a vector on other terms."
        )
    _log.info("strength %.4g moves 95 %% of tokens by up to %.3g nats", strength, seen[strength])
    return with_record(vector, DoseRecord(budget, strength, tuple(sorted(seen.items())), len(forced)))


def with_record(vector: SteeringVector, record: DoseRecord) -> SteeringVector:
    """The same vector with what was seen of it."""
    return _with_metadata(vector, {**vector.metadata, FIELD: record.text()})


def _uncalibrated(vector: SteeringVector) -> SteeringVector:
    return _with_metadata(vector, {key: text for key, text in vector.metadata.items() if key != FIELD})


def _with_metadata(vector: SteeringVector, metadata: dict[str, str]) -> SteeringVector:
    return SteeringVector(
        vector,
        model=vector.model,
        model_family=vector.model_family,
        method=vector.method,
        seed=vector.seed,
        metadata=metadata,
        library_version=vector.library_version,
        terms=vector.terms,
    )


def plain_pairs(
    adapter: ModelAdapter,
    tokenizer: Any,
    prompts: Sequence[Prompt] | None,
    answers: Sequence[str | Sequence[int]] | None,
    max_tokens: int,
    seed: int,
) -> list[Pair]:
    """(prompt ids, answer ids) of given answers, or of those that the plain model writes.

    Raises:
        ValidationError: lists that don't belong together, or a model that writes nothing.
    """
    if prompts is None:
        if answers is not None:
            raise ValidationError("answers go with prompts: give both, or neither.")
        prompts = open_prompts(tokenizer)
    prompts = as_list("prompts", prompts, "prompts")
    if answers is not None:
        answers = as_list("answers", answers, "answers")
        if len(answers) != len(prompts):
            raise ValidationError(f"there are {len(prompts)} prompts: give as many answers.")
        return list(encode_pairs(tokenizer, list(zip(prompts, answers, strict=True))))
    (written,) = write(adapter, tokenizer, prompts, [()], Options(max_tokens=max_tokens, seed=seed))
    pairs = [one.pair for one in written if one.pair is not None]
    if not pairs:
        raise ValidationError("the model answers nothing to these prompts: give answers, or other prompts.")
    return pairs


def dose_quantile(kl: Tensor) -> float:
    """The 95th percentile [nats] of KL by token."""
    return float(torch.quantile(kl.double(), QUANTILE))


def search(
    forced: ForcedAnswers, adapter: ModelAdapter, vector: SteeringVector, budget: float
) -> dict[float, float]:
    """Strengths that were tried, to the 95th percentile seen at each, until one is near the budget."""
    seen: dict[float, float] = {}
    norms = {layer: forced.norm(layer) for layer in vector.layers}
    unit = min(norms[layer] / norm for layer, norm in vector.norms().items() if norm > 0) / len(norms) ** 0.5
    tried = [share * unit for share in SHARES]
    for n in range(PASSES):
        settings = [tuple(vector.plan(adapter, strength).interventions) for strength in tried]
        for strength, found in zip(tried, forced.under(settings), strict=True):
            seen[strength] = max(dose_quantile(found.kl), 1e-12)
        if min(abs(found / budget - 1) for found in seen.values()) <= TOLERANCE:
            break
        low, high = _bracket(seen, budget)
        if low is None:
            if n and max(seen.values()) < 1.1 * min(seen.values()):
                break  # less strength isn't less of this edit
            tried = [_beyond(min(seen), seen, budget)]
        elif high is None:
            tried = [_beyond(max(seen), seen, budget)]
        else:
            middle = _between(seen, low, high, budget)
            tried = [middle] if n < SINGLE else [middle, *(middle * factor for factor in BESIDE)]
            tried = [one for one in tried if low < one < high and one not in seen]
    return seen


def _bracket(seen: dict[float, float], budget: float) -> tuple[float | None, float | None]:
    """Neighbours of which the weaker moves texts by less than the budget and the stronger by more; the first such."""
    strengths = sorted(seen)
    for low, high in pairwise(strengths):
        if seen[low] <= budget < seen[high]:
            return low, high
    below = [one for one in strengths if seen[one] <= budget]
    return (max(below), None) if below else (None, min(strengths))


def _beyond(strength: float, seen: dict[float, float], budget: float) -> float:
    """Where the budget should be met from the nearest strength that was tried, which is on the wrong side of it."""
    factor: float = (budget / seen[strength]) ** (1 / POWER)
    # A little further, so that the budget lies between.
    further = 1.1 if factor > 1 else 1 / 1.1
    return strength * min(max(factor * further, 1 / FARTHEST), FARTHEST)


def _between(seen: dict[float, float], low: float, high: float, budget: float) -> float:
    """Where the budget is met between two strengths, on logarithmic axes: by a parabola through the nearest three.

    By a line through the two where there is no third, or the parabola leaves what is between them.
    """
    bottom, top = math.log(low), math.log(high)
    edge = 0.02 * (top - bottom)
    others = [one for one in seen if one not in (low, high)]
    third = min(others, key=lambda one: abs(math.log(seen[one] / budget)), default=None)
    if third is not None and len({seen[low], seen[high], seen[third]}) == 3:
        found = _through([(math.log(seen[one] / budget), math.log(one)) for one in (low, high, third)])
        if bottom + edge < found < top - edge:
            return math.exp(found)
    found = _through([(math.log(seen[one] / budget), math.log(one)) for one in (low, high)])
    return math.exp(min(max(found, bottom + edge), top - edge))


def _through(points: Sequence[tuple[float, float]]) -> float:
    """At 0, the value of the polynomial through points (x, y), no two of one x (Lagrange)."""
    return sum(
        y * math.prod(other / (other - x) for j, (other, _) in enumerate(points) if j != i)
        for i, (x, y) in enumerate(points)
    )
