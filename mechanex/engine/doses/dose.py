"""A dose: where, how and how strongly a direction is put into the stream."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ...errors import ValidationError
from ..hooks import Intervention, SteeringPlan, as_interventions
from ..intervention import Edit
from ..models import adapter_for
from ..models.adapter import ModelAdapter
from ..terms import TOKENS, check_token_kind
from ..vectors import SteeringVector

__all__ = ["EDITS", "Dose", "Edited", "check_kind", "edited_by", "kind_of"]

EDITS = ("add", "clamp", "norm", "rotate")
"""add: the vector is added; clamp: the projection on it becomes its norm; norm: it is added and the row gets its own
norm back; rotate: the row is turned from the mean stream to the vector, by the angle that adding it to the mean
makes."""

SHARED = ("add", "norm")
"""Edits of which several layers in a row can do a share each."""

Edited = tuple[Intervention, ...]
"""What is done to a text: the edits of one setting, empty for none."""


@dataclass(frozen=True)
class Dose:
    """One way to give a vector.

    Args:
        layer: where.
        strength: multiplies the vector.
        edit: how; one of ``EDITS``.
        tokens: ``"all"``, ``"generated"`` (those that an answer is predicted from) or ``"prompt"`` (those before).
        method: how the vector was made.
        width: how many layers, from this one on, share the strength; more than one only where vectors are added.

    Raises:
        ValidationError: an unknown edit or name of tokens, or a width that doesn't fit the edit.
    """

    layer: int
    strength: float
    edit: str = "add"
    tokens: str = "all"
    method: str = "caa"
    width: int = 1

    def __post_init__(self) -> None:
        check_kind(self.edit)
        check_token_kind(self.tokens)
        if self.width < 1 or (self.width > 1 and self.edit not in SHARED):
            raise ValidationError(
                f"a dose has a width of 1 or more, and more than 1 only where the edit is one of "
                f"{', '.join(map(repr, SHARED))}; got {self.width} and {self.edit!r}."
            )

    @property
    def layers(self) -> range:
        """The layers that are steered."""
        return range(self.layer, self.layer + self.width)

    def of(self, vector: SteeringVector) -> Edited:
        """What this dose of a vector does; the vector has the dose's layers, and for a rotation a plane."""
        return tuple(
            Intervention(layer, self._edit(vector, layer), tokens=TOKENS[self.tokens])
            for layer in self.layers
        )

    def _edit(self, vector: SteeringVector, layer: int) -> Edit:
        direction = vector[layer] * (self.strength / self.width)
        if self.edit == "rotate":
            return Edit.rotate(vector[layer], self._plane(vector), self._degrees(vector))
        if self.edit == "clamp":
            return Edit.clamp(direction, 1.0)
        edit = Edit.add(direction)
        return edit.gated("norm") if self.edit == "norm" else edit

    def _plane(self, vector: SteeringVector) -> Tensor:
        plane = vector.terms.planes.get(self.layer)
        if plane is None:
            raise ValidationError(
                "a rotation needs a second direction at its layer: give the vector one, vector.rotating(means, 0)."
            )
        return plane

    def _degrees(self, vector: SteeringVector) -> float:
        """Strength times the angle between the mean stream and the mean stream with the vector added."""
        mean = self._plane(vector).double()
        along = mean / mean.norm()
        direction = vector[self.layer].double()
        across = direction - (direction @ along) * along
        return self.strength * math.degrees(math.atan2(float(across.norm()), float(mean.norm())))

    def vector(self, vector: SteeringVector) -> SteeringVector:
        """The vector whose strength 1 is this dose."""
        made = SteeringVector(
            {layer: vector[layer] * (self.strength / self.width) for layer in self.layers},
            model=vector.model,
            model_family=vector.model_family,
            method=vector.method,
            seed=vector.seed,
        ).on_tokens(self.tokens)
        if self.edit == "clamp":
            return made.clamping()
        if self.edit == "norm":
            return made.keeping_norm()
        if self.edit == "rotate":
            return made.rotating({self.layer: self._plane(vector)}, self._degrees(vector))
        return made

    def __str__(self) -> str:
        where = "" if self.tokens == "all" else f", {self.tokens} tokens"
        layers = f"layer {self.layer}"
        if self.width > 1:
            layers = f"layers {self.layer} to {self.layers[-1]}"
        return f"{layers}, {self.edit}{where}, {self.strength:.3g} ×"


def check_kind(edit: str) -> None:
    """Raises a ValidationError for a kind of edit that there is none of."""
    if edit not in EDITS:
        raise ValidationError(f"an edit is one of {', '.join(map(repr, EDITS))}; got {edit!r}.")


def kind_of(vector: SteeringVector) -> str:
    """How a vector edits, in a word."""
    terms = vector.terms
    if terms.planes:
        return "rotate"
    gates = {gate.kind for gate in terms.gates.values()}
    how = "clamp" if terms.clamps else "norm" if gates == {"norm"} else "gated" if gates else "add"
    return how + (", scheduled" if terms.schedule else "") + (", when" if terms.condition else "")


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
        found: Sequence[Intervention] = steering.interventions
    elif isinstance(steering, (Intervention, Sequence)) and not isinstance(steering, str):
        found = as_interventions(steering)
    else:
        vector = steering if isinstance(steering, SteeringVector) else SteeringVector(steering)
        return tuple(vector.plan(adapter, strength).interventions) if strength else ()
    if strength != 1:
        raise ValidationError(f"a plan has its own strengths; leave strength={strength!r} out.")
    for one in found:
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
