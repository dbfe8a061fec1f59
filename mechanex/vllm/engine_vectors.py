"""What an engine's users steer by: vectors by id, and what of them the workers hold."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..engine.intervention import Edit
from ..engine.terms import TOKENS
from ..engine.vectors import SteeringVector
from ..errors import NotFoundError, ValidationError
from .asked import AskedEdit, Scope, as_scope, as_text
from .capacity import Capacity
from .stream import check_edits
from .units import key_of, packed

__all__ = ["Carried", "EngineVectors", "SteerBy", "edits_by_layer"]

_logger = logging.getLogger(__name__)
_MOST_NAMES = 10_000
_MOST_PACKED = 1024


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
        self._vectors: dict[str, _Known] = {}
        self._packed: OrderedDict[tuple[str, tuple[int, ...], float], tuple[str, bytes]] = OrderedDict()
        self._sent: set[str] = set()

    @property
    def ids(self) -> tuple[str, ...]:
        """The ids of all vectors."""
        return tuple(self._vectors)

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
        known = _known(source, self.n_layers)
        check_edits(known.edits, self.width, self.n_layers, self.capacity)
        vector_id = key_of(packed(known.edits)) if vector_id is None else vector_id
        if len(self._vectors) >= _MOST_NAMES and vector_id not in self._vectors:
            raise ValidationError(
                f"{_MOST_NAMES} vectors are registered, and no more are taken: remove some."
            )
        self.remove(vector_id, missing_ok=True)
        self._vectors[vector_id] = known
        return vector_id

    def remove(self, vector_id: str, *, missing_ok: bool = False) -> None:
        """Forgets an id; requests that steer by it go on.

        Raises:
            NotFoundError: nobody registered it.
        """
        if self._vectors.pop(vector_id, None) is None and not missing_ok:
            raise NotFoundError(f"no steering vector has the id {vector_id!r} here.")
        for known in [key for key in self._packed if key[0] == vector_id]:
            del self._packed[known]

    def __contains__(self, vector_id: object) -> bool:
        return vector_id in self._vectors

    def asked(self, steering: SteerBy | Sequence[SteerBy] | None) -> Carried:
        """What a request that is to be steered so carries.

        Raises:
            NotFoundError: an id that nobody registered.
            ValidationError: a layer that the vector hasn't, tokens or strengths that are none, or too many vectors.
        """
        items = [steering] if isinstance(steering, SteerBy) else list(steering or ())
        edits, missing = [], {}
        for item in items:
            known = self._vectors.get(item.vector)
            if known is None:
                raise NotFoundError(f"no steering vector has the id {item.vector!r} here.")
            strength = _strength(item.strength)
            tokens = as_scope(known.tokens if item.tokens is None else item.tokens)
            layers = self._layers(item, known)
            if not strength:
                continue
            key, data = self._unit(item.vector, known, layers, strength)
            edits.append(AskedEdit(key, 1.0 if known.at is not None else strength, tokens))
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

    def _layers(self, item: SteerBy, known: _Known) -> tuple[int, ...]:
        if item.layers is None:
            return tuple(known.edits)
        layers = tuple(sorted({_layer(layer, self.n_layers) for layer in item.layers}))
        missing = [layer for layer in layers if layer not in known.edits]
        if missing or not layers:
            raise ValidationError(
                f"the vector {item.vector!r} has layers {list(known.edits)}, and not {missing or 'none'}."
            )
        return layers

    def _unit(
        self, vector_id: str, known: _Known, layers: tuple[int, ...], strength: float
    ) -> tuple[str, bytes]:
        """The packed edits of some layers, and their key."""
        name = vector_id, layers, strength if known.at is not None else 1.0
        found = self._packed.get(name)
        if found is None:
            edits = known.edits if known.at is None else known.at(strength)
            data = packed({layer: edits[layer] for layer in layers})
            found = self._packed[name] = key_of(data), data
            if len(self._packed) > _MOST_PACKED:
                self._packed.popitem(last=False)
        return found


@dataclass(frozen=True)
class _Known:
    """What an id stands for.

    Args:
        edits: by layer, at strength 1.
        at: the edits at a strength, where that doesn't merely multiply what they change.
        tokens: which they edit where a request doesn't say.
    """

    edits: Mapping[int, Edit]
    at: Callable[[float], Mapping[int, Edit]] | None = None
    tokens: Scope = None


def _known(source: object, n_layers: int) -> _Known:
    """What a user means by a vector, by ``{layer: tensor or Edit}``.

    Raises:
        ValidationError: it is neither.
    """
    if not isinstance(source, SteeringVector):
        return _Known(edits_by_layer(source, n_layers))
    terms = source.terms
    if terms.schedule or terms.condition:
        raise ValidationError(
            "in vLLM a vector does the same all along a text, and this one has a schedule or a condition on prompts: "
            "serve it with mechanex serve, or take its numbers, SteeringVector(dict(vector))."
        )

    def at(strength: float) -> dict[int, Edit]:
        return {
            layer: terms.made(layer, lambda s, v=v: Edit.add(v * s), v)(strength)  # type: ignore[misc]
            for layer, v in ((layer, source[layer].float()) for layer in source.layers)
        }

    # The strength of a clamp and of a rotation is where they lead to.
    shaped = bool(terms.clamps or terms.planes)
    return _Known(at(1.0), at if shaped else None, TOKENS[terms.tokens])


def edits_by_layer(source: object, n_layers: int) -> dict[int, Edit]:
    """The edits that a user means by ``{layer: tensor or Edit}``.

    Raises:
        ValidationError: it is something else.
    """
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
