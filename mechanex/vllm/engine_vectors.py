"""What an engine's users steer by: vectors by id, and what of them the workers hold."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..engine.intervention import Edit
from ..engine.vectors import SteeringVector
from ..errors import NotFoundError, ValidationError
from .asked import AskedEdit, Scope, as_scope, as_text
from .capacity import Capacity
from .stream import check_edits
from .units import key_of, packed

__all__ = ["Carried", "EngineVectors", "SteerBy", "edits_by_layer"]

_logger = logging.getLogger(__name__)
_MOST_NAMES = 10_000


@dataclass(frozen=True)
class SteerBy:
    """One vector of a request.

    Args:
        vector: an id that ``register`` gave or was given.
        strength: multiplies it; 0 steers nothing.
        layers: only these of its layers.
        tokens: which tokens: None for all, ``"prompt"`` or ``"generated"``, an absolute position, or a slice of them;
            negatives count from the end of the prompt.
    """

    vector: str
    strength: float = 1.0
    layers: Sequence[int] | None = None
    tokens: Scope = None


@dataclass(frozen=True)
class Carried:
    """What a request's steering becomes.

    Args:
        text: what the request carries; None where it isn't steered.
        missing: packed edits that the workers don't hold yet, by their keys.
    """

    text: str | None
    missing: Mapping[str, bytes]


class EngineVectors:
    """Edits by id, of one engine.

    Args:
        width: d_model of its model.
        n_layers: how many layers it has.
        capacity: of the engine's tables.
        family: the model's architecture, where it is known.
    """

    def __init__(self, width: int, n_layers: int, capacity: Capacity, family: str | None = None) -> None:
        self.width, self.n_layers, self.capacity, self.family = width, n_layers, capacity, family
        self._edits: dict[str, Mapping[int, Edit]] = {}
        self._packed: dict[tuple[str, tuple[int, ...]], tuple[str, bytes]] = {}
        self._sent: set[str] = set()

    @property
    def ids(self) -> tuple[str, ...]:
        """The ids of all vectors."""
        return tuple(self._edits)

    def add(self, source: object, vector_id: str | None = None) -> str:
        """Takes a vector in, and gives its id.

        Args:
            source: a SteeringVector, or ``{layer: tensor or Edit}``; layers count from 0, negatives from the end.
            vector_id: its id; None for a hash of its content. Another vector of this id makes way.

        Raises:
            ValidationError: it doesn't fit the model or the tables.
        """
        made_for = source.model_family if isinstance(source, SteeringVector) else None
        if None not in (self.family, made_for) and self.family != made_for:
            raise ValidationError(
                f"the vector was made for a model of the family {made_for!r}, and this one is of {self.family!r}: use "
                "a vector of this family, or its numbers as {layer: tensor}."
            )
        edits = edits_by_layer(source, self.n_layers)
        check_edits(edits, self.width, self.n_layers, self.capacity)
        vector_id = key_of(packed(edits)) if vector_id is None else vector_id
        if len(self._edits) >= _MOST_NAMES and vector_id not in self._edits:
            raise ValidationError(
                f"{_MOST_NAMES} vectors are registered, and no more are taken: remove some."
            )
        self.remove(vector_id, missing_ok=True)
        self._edits[vector_id] = edits
        return vector_id

    def remove(self, vector_id: str, *, missing_ok: bool = False) -> None:
        """Forgets an id; requests that steer by it go on.

        Raises:
            NotFoundError: nobody registered it.
        """
        if self._edits.pop(vector_id, None) is None and not missing_ok:
            raise NotFoundError(f"no steering vector has the id {vector_id!r} here.")
        for known in [key for key in self._packed if key[0] == vector_id]:
            del self._packed[known]

    def __contains__(self, vector_id: object) -> bool:
        return vector_id in self._edits

    def asked(self, steering: SteerBy | Sequence[SteerBy] | None) -> Carried:
        """What a request that is to be steered so carries.

        Raises:
            NotFoundError: an id that nobody registered.
            ValidationError: a layer that the vector hasn't, tokens or strengths that are none, or too many vectors.
        """
        items = [steering] if isinstance(steering, SteerBy) else list(steering or ())
        edits, missing = [], {}
        for item in items:
            strength = _strength(item.strength)
            key, data = self._unit(item)
            tokens = as_scope(item.tokens)
            if strength:
                edits.append(AskedEdit(key, strength, tokens))
                if key not in self._sent:
                    missing[key] = data
        if len(edits) > self.capacity.per_token:
            raise ValidationError(
                f"a request steers by {len(edits)} vectors, and this engine was started for "
                f"{self.capacity.per_token}: start it with steering_per_token={len(edits)}."
            )
        return Carried(as_text(edits) if edits else None, missing)

    def sent(self, keys: Sequence[str]) -> None:
        """Notes what the workers hold now."""
        self._sent.update(keys)

    def _unit(self, item: SteerBy) -> tuple[str, bytes]:
        edits = self._edits.get(item.vector)
        if edits is None:
            raise NotFoundError(f"no steering vector has the id {item.vector!r} here.")
        layers = tuple(edits)
        if item.layers is not None:
            layers = tuple(sorted({_layer(layer, self.n_layers) for layer in item.layers}))
            missing = [layer for layer in layers if layer not in edits]
            if missing or not layers:
                raise ValidationError(
                    f"the vector {item.vector!r} has layers {list(edits)}, and not {missing or 'none'}."
                )
        known = self._packed.get((item.vector, layers))
        if known is None:
            data = packed({layer: edits[layer] for layer in layers})
            known = self._packed[item.vector, layers] = key_of(data), data
        return known


def _edit_of(vector: SteeringVector, layer: int) -> Edit:
    """What a vector does at a layer, as its terms say."""
    terms = vector.terms
    if terms.schedule or terms.condition or terms.planes or terms.clamps or terms.tokens != "all":
        raise ValidationError(
            "in vLLM a vector does the same to every token, times its strength, and this one has a schedule, a "
            "condition on prompts, tokens of its own, a rotation or a clamp: serve it with mechanex serve, or take its "
            "numbers, SteeringVector(dict(vector)), or give {layer: Edit.clamp(…)}."
        )
    edit, gate = Edit.add(vector[layer].float()), terms.gates.get(layer)
    return edit if gate is None else edit.gated(gate.kind, gate.weight, gate.offset)


def edits_by_layer(source: object, n_layers: int) -> dict[int, Edit]:
    """The edits that a user means by a vector, by ``{layer: tensor or Edit}``.

    Raises:
        ValidationError: it is neither.
    """
    if isinstance(source, SteeringVector):
        return {layer: _edit_of(source, layer) for layer in source.layers}
    if not isinstance(source, Mapping) or not source:
        raise ValidationError(
            f"a vector is a SteeringVector or {{layer: tensor or Edit}}; got {type(source).__name__}."
        )
    found: dict[int, Edit] = {}
    for layer, given in source.items():
        edit = given if isinstance(given, Edit) else Edit.add(torch.as_tensor(given, dtype=torch.float32))
        found[_layer(layer, n_layers)] = edit.to(torch.device("cpu"), torch.float32)
    if len(found) < len(source):
        raise ValidationError(f"a layer is named twice in {list(source)}: keep one.")
    return dict(sorted(found.items()))


def _layer(layer: Any, n_layers: int) -> int:
    if isinstance(layer, bool) or not isinstance(layer, int):
        raise ValidationError(f"a layer is a whole number; got {layer!r}.")
    return layer if layer >= 0 else layer + n_layers


def _strength(strength: object) -> float:
    if isinstance(strength, bool) or not isinstance(strength, (int, float)) or not abs(strength) < 1e9:
        raise ValidationError(f"a strength is a finite number; got {strength!r}.")
    return float(strength)
