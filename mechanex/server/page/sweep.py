"""A small sweep for the playground: a vector's effect and price at several strengths, all settings in one batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...engine.doses.forced import ForcedAnswers
from ...engine.hooks import Intervention
from ...errors import APIError, MechanexError, ValidationError

if TYPE_CHECKING:
    from ...engine.models.adapter import ModelAdapter
    from ...engine.pack import Pair
    from ...engine.vectors import SteeringVector

__all__ = ["swept"]


def swept(
    adapter: ModelAdapter,
    vector: SteeringVector,
    strengths: Sequence[float],
    layers: Sequence[int | None],
    answers: Sequence[Pair],
    examples: Sequence[Pair],
    before: Sequence[Intervention] = (),
) -> list[dict[str, Any]]:
    """For each layer one line of points over the strengths.

    Args:
        adapter: the model, nobody else's meanwhile.
        vector: what steers; without a condition.
        strengths: multiply it.
        layers: one of the vector's each, or None for all of them together.
        answers: whose tokens tell the price, the mean of KL(steered‖plain) in nats.
        examples: all positive ones, then all negative ones; they tell the effect, the change in how much likelier the
            positive answers are than the negative ones, in nats a token. Empty: no effect is told.
        before: edits that every answer of the server has.

    Raises:
        ValidationError: a vector with a condition, or logits that steering makes NaN or infinite.
    """
    if vector.terms.condition is not None:
        raise ValidationError(
            "a vector with a condition is decided where text is written, so it can't be swept over given texts: "
            "sweep it without the condition."
        )
    settings = []
    for layer in layers:
        part = vector if layer is None else vector.restricted([layer])
        for strength in strengths:
            steered = part.plan(adapter, strength).interventions if strength else ()
            settings.append((*steered, *before))
    forced = ForcedAnswers(adapter, [*answers, *examples])
    try:
        found = forced.under(settings)
    except (APIError, ValidationError):
        raise
    except MechanexError as error:  # of the model's numbers
        raise ValidationError(error.message) from error
    n, half = len(answers), len(examples) // 2

    def margin(logprobs: Any) -> float:
        means = forced.by_answer(logprobs, mean=True)[n:]
        return float(means[:half].mean() - means[half:].mean())

    at_rest = margin(forced.plain) if half else 0.0
    points = [
        {
            "strength": strength,
            "kl": round(float(forced.by_answer(one.kl, mean=True)[:n].mean()), 5),
            "effect": round(margin(one.logprobs) - at_rest, 5) if half else None,
        }
        for one, strength in zip(found, [*strengths] * len(layers), strict=True)
    ]
    step = len(strengths)
    return [{"layer": layer, "points": points[i * step : (i + 1) * step]} for i, layer in enumerate(layers)]
