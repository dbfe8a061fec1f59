"""Making a behavior of contrastive examples: detectors, held-out figures, a threshold, and what corrects it best."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...errors import ValidationError
from ..caa import check_examples, default_layer
from ..given import as_finite
from ..models import adapter_for
from ..models.adapter import ModelAdapter
from ..text import Prompt
from ..vectors import SteeringVector
from .autoencoder import SparseAutoencoder
from .behavior import Behavior
from .calibration import ANSWER_TOKENS, calibrated, per_answer, share, widened
from .corrections import WAYS, Correction, Way
from .detectors import Detector, FeatureDetector, ProbeDetector, auroc, fit_features, fit_probe
from .examples import Examples, answer_logprobs, read_examples
from .hook_points import HookPoint

__all__ = ["create"]

_log = logging.getLogger(__name__)

FOLDS = 5
LEAST_EXAMPLES = 4
FEATURES = 16
STRENGTHS = (1.0, 2.0)
# What a correction may cost on answers without the behavior: their perplexity times 1.5.
DEAREST = math.log(1.5)


@dataclass(frozen=True)
class _HeldOut:
    """Scores of every example by detectors that were made without it.

    Args:
        positive, negative: for every example, the scores of its answer's tokens.
    """

    positive: list[Tensor]
    negative: list[Tensor]

    @property
    def auroc(self) -> tuple[float, float, float]:
        """Of answers by their mean score."""
        means = [[float(one.mean()) for one in side] for side in (self.positive, self.negative)]
        return auroc(*means)


def create(
    model: nn.Module | ModelAdapter,
    name: str,
    prompts: Sequence[Prompt],
    positive_answers: Sequence[str],
    negative_answers: Sequence[str],
    *,
    sae: SparseAutoencoder | None = None,
    source: str | None = None,
    description: str = "",
    vector: SteeringVector | None = None,
    steering_vector_id: str | None = None,
    detector: Literal["auto", "features", "probe"] = "auto",
    correction: Way | Literal["auto"] = "auto",
    false_alarms: float = 0.01,
    tokenizer: Any = None,
    batch_tokens: int | None = None,
    progress: bool = False,
) -> Behavior:
    """Makes a behavior of examples.

    Examples are set aside in turn (five folds), so that every figure is of answers that made no part of what it is
    measured of. What is kept is made of all of them.

    Args:
        model: a Hugging Face or TransformerLens model.
        name: what the behavior is called by.
        prompts: one per example.
        positive_answers: answers that show the behavior.
        negative_answers: answers that don't.
        sae: the autoencoder that watches; None for the plain probe alone.
        source: where the autoencoder comes from, to find it again.
        description: for people.
        vector: its direction at the point corrects, in place of the difference of means; at the residual stream alone.
        steering_vector_id: the vector's id.
        detector: ``"features"``, ``"probe"``, or ``"auto"`` for the one with the higher held-out AUROC, and of equal
            ones the one that finds more answers.
        correction: one of ``WAYS``, or ``"auto"`` for what moves held-out answers furthest from positive to negative
            ones and multiplies the negative ones' perplexity by 1.5 at most.
        false_alarms: wanted rate per answer of 64 tokens.
        tokenizer: needed where the model carries none.
        batch_tokens: most tokens of one pass; None for what suits the device.
        progress: show a progress bar.

    Raises:
        ValidationError: too few examples, lists that don't belong together, an autoencoder of another width or without
            a place, a vector without this layer, or answers that no detector tells apart. Nothing is kept then.
    """
    adapter = adapter_for(model)
    check_examples(adapter, prompts, positive_answers, negative_answers, None)
    if len(prompts) < LEAST_EXAMPLES:
        raise ValidationError(
            f"a behavior needs at least {LEAST_EXAMPLES} examples, of which some are held out to measure it; got "
            f"{len(prompts)}."
        )
    rate = as_finite(false_alarms)
    if rate is None or not 0 < rate < 1:
        raise ValidationError(
            f"false_alarms is a rate per answer of {ANSWER_TOKENS} tokens, between 0 and 1; got {false_alarms!r}."
        )
    if detector not in ("auto", "features", "probe") or correction not in ("auto", *WAYS):
        raise ValidationError(
            f"detector is auto, features or probe and correction auto or one of {', '.join(WAYS)}; got "
            f"{detector!r} and {correction!r}."
        )
    if sae is None and (detector == "features" or correction == "features"):
        raise ValidationError("features are those of an autoencoder, and there is none: give sae=….")
    point = HookPoint("resid", default_layer(adapter.n_layers))
    if sae is not None:
        if sae.point is None:
            raise ValidationError(
                "it isn't known where this autoencoder reads: read it with point='resid.…'."
            )
        point, sae = sae.point, sae.to("cpu")
    examples = read_examples(
        adapter,
        point,
        prompts,
        positive_answers,
        negative_answers,
        tokenizer=tokenizer,
        batch_tokens=batch_tokens,
        progress=progress,
    )
    if sae is not None and sae.d_in != examples.x.shape[1]:
        raise ValidationError(
            f"the autoencoder reads activations of width {sae.d_in} and those of {adapter.model_id} at {point} are "
            f"{examples.x.shape[1]} wide: use one that was made for this model."
        )
    direction = None if vector is None else _direction(vector, vector_layer(point))
    folds = _folds(examples)
    held = {kind: _held_out(kind, sae, examples, folds) for kind in ("features", "probe")}
    chosen, threshold, figures = _choose(held, detector, rate)
    probe = fit_probe(examples.x, examples.answer, examples.positive)
    features = None if sae is None else fit_features(sae, examples.x, examples.answer, examples.positive)
    way, strength, effects = _best_correction(
        adapter, point, examples, folds, sae, direction, correction, batch_tokens
    )
    return Behavior(
        name=name,
        description=description,
        model=adapter.model_id,
        family=adapter.family,
        width=examples.x.shape[1],
        point=point,
        detector=chosen,
        probe=probe,
        features=None if features is None else features.narrowed(),
        sae=source,
        threshold=threshold,
        correction=_correction(
            way, strength, probe, None if features is None else features.narrowed(), direction, examples
        ),
        steering_vector_id=steering_vector_id,
        figures={
            **figures,
            "corrections": effects,
            "examples": len(prompts),
            "false_alarms_wanted": rate,
        },
    )


def vector_layer(point: HookPoint) -> int:
    """The layer of a steering vector that acts at this place.

    Raises:
        ValidationError: vectors act on the residual stream alone.
    """
    if point.kind != "resid":
        raise ValidationError(
            f"a steering vector acts on the residual stream, and this behavior is read at {point}: leave the vector "
            "out."
        )
    return point.layer


def _direction(vector: SteeringVector, layer: int) -> Tensor:
    if layer not in vector:
        raise ValidationError(
            f"the vector has layers {list(vector.layers)} and the behavior is read at layer {layer}: make one with "
            f"layer_idxs=[{layer}]."
        )
    found = vector[layer].float()
    unit: Tensor = found / found.norm()
    return unit


def _folds(examples: Examples) -> list[list[int]]:
    count = min(FOLDS, examples.n)
    return [list(range(i, examples.n, count)) for i in range(count)]


def _without(examples: Examples, fold: Sequence[int]) -> Examples:
    return examples.of([i for i in range(examples.n) if i not in set(fold)])


def _held_out(
    kind: str, sae: SparseAutoencoder | None, examples: Examples, folds: Sequence[Sequence[int]]
) -> _HeldOut | None:
    """None where the kind of detector can't be made."""
    positive: list[Tensor] = [torch.zeros(0)] * examples.n
    negative: list[Tensor] = [torch.zeros(0)] * examples.n
    for fold in folds:
        rest, mine = _without(examples, fold), examples.of(fold)
        made: Detector | None
        if kind == "probe":
            made = fit_probe(rest.x, rest.answer, rest.positive)
        else:
            made = None if sae is None else fit_features(sae, rest.x, rest.answer, rest.positive)
        if made is None:
            return None
        scores = mine.by_answer(made.scores(mine.x))
        for place, i in enumerate(fold):
            positive[i], negative[i] = scores[place], scores[place + mine.n]
    return _HeldOut(positive, negative)


def _choose(
    held: dict[str, _HeldOut | None], wanted: str, false_alarms: float
) -> tuple[Literal["features", "probe"], float, dict[str, Any]]:
    """The detector that decides, its threshold, and the figures of both."""
    figures: dict[str, Any] = {}
    ranks: dict[str, tuple[float, float]] = {}
    thresholds: dict[str, float] = {}
    for kind, found in held.items():
        if found is None:
            continue
        area, low, high = found.auroc
        thresholds[kind] = widened(calibrated(torch.cat(found.negative), false_alarms), found.positive)
        alarms = per_answer(found.negative, thresholds[kind])
        hits = share([bool((one > thresholds[kind]).any()) for one in found.positive])
        figures[kind + "_figures"] = {
            "auroc": area,
            "auroc_interval": [low, high],
            "false_alarms": asdict(alarms),
            "detected": asdict(hits),
        }
        ranks[kind] = (round(area, 3), hits.rate)
    if wanted == "features" and "features" not in ranks:
        raise ValidationError(
            "no feature of the autoencoder differs between positive and negative answers: use detector='probe', or "
            "another autoencoder."
        )
    chosen: Any = max(ranks, key=lambda kind: ranks[kind]) if wanted == "auto" else wanted
    area, (low, _) = ranks[chosen][0], figures[chosen + "_figures"]["auroc_interval"]
    if low <= 0.5:
        raise ValidationError(
            f"the examples don't separate: on answers held out, the {chosen} put {area:.0%} of pairs in order (AUROC "
            f"{area:.2f}, at least {low:.2f} with 95 % confidence), and guessing puts half. Give more or clearer "
            "examples. Nothing is kept."
        )
    if figures[chosen + "_figures"]["detected"]["rate"] < 0.5:
        _log.warning(
            "at %.1f %% false alarms an answer, %.0f %% of the answers with the behavior are detected",
            100 * false_alarms,
            100 * figures[chosen + "_figures"]["detected"]["rate"],
        )
    return chosen, thresholds[chosen], figures


def _correction(
    way: Way,
    strength: float,
    probe: ProbeDetector,
    features: FeatureDetector | None,
    direction: Tensor | None,
    examples: Examples,
) -> Correction:
    if direction is None:
        return Correction(way, probe.direction, probe.low, probe.high, strength, features)
    along = examples.x @ direction
    positive = examples.positive[examples.answer]
    low, high = float(along[~positive].mean()), float(along[positive].mean())
    if high < low:
        direction, low, high = -direction, -low, -high
    return Correction(way, direction, low, high, strength, features)


def _best_correction(
    adapter: ModelAdapter,
    point: HookPoint,
    examples: Examples,
    folds: Sequence[Sequence[int]],
    sae: SparseAutoencoder | None,
    direction: Tensor | None,
    wanted: str,
    batch_tokens: int | None,
) -> tuple[Way, float, list[dict[str, Any]]]:
    """The way that held-out examples are moved furthest by, and what each way does to them."""
    fold = folds[0]
    rest, mine = _without(examples, fold), examples.of(fold)
    probe = fit_probe(rest.x, rest.answer, rest.positive)
    features = None if sae is None else fit_features(sae, rest.x, rest.answer, rest.positive)
    ways: list[Way] = [way for way in WAYS if wanted in ("auto", way)]
    if features is None:
        ways = [way for way in ways if way != "features"]
    plain = answer_logprobs(adapter, point, mine.pairs, None, batch_tokens=batch_tokens)
    effects: list[dict[str, Any]] = []
    for way in ways:
        for strength in STRENGTHS:
            made = _correction(way, strength, probe, features, direction, rest)
            now = answer_logprobs(adapter, point, mine.pairs, made, batch_tokens=batch_tokens)
            moved = (now - plain).view(2, mine.n)
            effects.append(
                {
                    "way": way,
                    "strength": strength,
                    "effect": float((moved[1] - moved[0]).mean()),
                    "price": float(-moved[1].mean()),
                }
            )
    if not effects:
        raise ValidationError(
            f"no correction can be made by {wanted}: no feature differs between the answers."
        )
    affordable = [one for one in effects if one["price"] <= DEAREST] or effects
    best = max(affordable, key=lambda one: one["effect"])
    return best["way"], best["strength"], effects
