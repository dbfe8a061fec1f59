"""A dose: where, how and how strongly a direction is put into the stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ...errors import ValidationError
from ..edit_kinds import TOKENS, check_kind, check_token_kind, edit_of
from ..hooks import Intervention, SteeringPlan
from ..models import adapter_for
from ..models.adapter import ModelAdapter
from ..vectors import SteeringVector

__all__ = ["Dose", "Edited", "edited_by"]

Edited = tuple[Intervention, ...]
"""What is done to a text: the edits of one setting, empty for none."""


@dataclass(frozen=True)
class Dose:
    """One way to give a vector.

    Args:
        layer: where.
        strength: multiplies the vector.
        edit: how; one of ``mechanex.engine.edit_kinds.EDITS``.
        tokens: ``"all"``, ``"generated"`` (those that an answer is predicted from) or ``"prompt"`` (those before).
        method: how the vector was made.

    Raises:
        ValidationError: an unknown edit or name of tokens.
    """

    layer: int
    strength: float
    edit: str = "add"
    tokens: str = "all"
    method: str = "caa"

    def __post_init__(self) -> None:
        check_kind(self.edit)
        check_token_kind(self.tokens)

    def of(self, vector: SteeringVector) -> Edited:
        """What this dose of a vector does; the vector has the dose's layer."""
        edit = edit_of(self.edit, vector[self.layer] * self.strength)
        return (Intervention(self.layer, edit, tokens=TOKENS[self.tokens]),)

    def vector(self, vector: SteeringVector) -> SteeringVector:
        """The vector whose strength 1 is this dose."""
        metadata = {"edit": self.edit, "edited_tokens": self.tokens}
        scaled = vector.restricted([self.layer]) * self.strength
        return SteeringVector(
            scaled,
            model=vector.model,
            model_family=vector.model_family,
            method=vector.method,
            seed=vector.seed,
            metadata={**scaled.metadata, **metadata},
        )

    def __str__(self) -> str:
        where = "" if self.tokens == "all" else f", {self.tokens} tokens"
        return f"layer {self.layer}, {self.edit}{where}, {self.strength:.3g} ×"


def edited_by(model: nn.Module | ModelAdapter, steering: Any, strength: float = 1.0) -> Edited:
    """The edits that a user means by a vector, a plan, interventions or ``{layer: tensor}``.

    Args:
        model: the model that is to be steered.
        steering: what steers it; interventions that name rows or a mask can't be given.
        strength: multiplies a vector; a plan has its own strengths.

    Raises:
        ValidationError: another kind, edits that don't fit the model, or a strength beside a plan.
    """
    adapter = adapter_for(model)
    if isinstance(steering, SteeringPlan):
        found: Sequence[Any] = steering.interventions
    elif isinstance(steering, Intervention):
        found = [steering]
    elif isinstance(steering, Sequence) and not isinstance(steering, str):
        found = steering
    else:
        vector = steering if isinstance(steering, SteeringVector) else SteeringVector(steering)
        return tuple(vector.plan(adapter, strength).interventions) if strength else ()
    if strength != 1:
        raise ValidationError(f"a plan has its own strengths; leave strength={strength!r} out.")
    for one in found:
        if not isinstance(one, Intervention):
            raise ValidationError(
                f"steering is a SteeringVector, a SteeringPlan or interventions; got {type(one).__name__}."
            )
        if one.mask is not None or one.rows is not None:
            raise ValidationError(
                "An edit names rows of a batch, but measuring lays out its own batches: steer by tokens."
            )
        if one.edit.width != adapter.d_model:
            raise ValidationError(
                f"An edit at layer {one.layer} is {one.edit.width} wide, and the stream of {adapter.model_id} "
                f"{adapter.d_model}: the vector was made for another model."
            )
        adapter.layer_index(one.layer)
    return tuple(found)
