"""What an engine's users steer by: vectors by id, and what of them the workers hold."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ..engine.vectors import SteeringVector
from ..errors import NotFoundError, ValidationError
from .asked import FIELD, AskedEdit, Carried, Scope, as_scope, as_text
from .capacity import Capacity
from .held import HeldUnits
from .parts import KnownVector, VectorPart, known_vector, layer_number
from .stream import check_edits
from .units import key_of, packed

__all__ = ["EngineVectors", "SteerBy"]

_MOST_NAMES = 10_000
_MOST_BYTES = 2**28


@dataclass(frozen=True)
class SteerBy:
    """One vector of a request.

    Args:
        vector: an id that ``register`` gave or was given.
        strength: multiplies it; 0 steers nothing.
        layers: only these of its layers.
        tokens: which tokens: None for those that the vector names itself, and all where it names none; ``"all"``,
            ``"prompt"`` or ``"generated"``, an absolute position, or a slice of them; negatives count from the end of
            the prompt.
    """

    vector: str
    strength: float = 1.0
    layers: Sequence[int] | None = None
    tokens: Scope | Literal["all"] = None


class EngineVectors:
    """Edits by id, of one engine.

    Args:
        width: d_model of its model.
        n_layers: how many layers it has.
        capacity: of the engine's tables.
        family: the model's architecture, where it is known.

    Attributes:
        held: what the workers hold of them.
    """

    def __init__(self, width: int, n_layers: int, capacity: Capacity, family: str | None = None) -> None:
        self.width, self.n_layers, self.capacity, self.family = width, n_layers, capacity, family
        self.held = HeldUnits(_MOST_BYTES)
        self._vectors: dict[str, KnownVector] = {}
        self._keys: OrderedDict[tuple[str, int, tuple[int, ...], float], str] = OrderedDict()

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
        known = known_vector(source, self.n_layers)
        for part in known.parts:
            check_edits(part.edits, self.width, self.n_layers, self.capacity)
        vector_id = _content(known) if vector_id is None else vector_id
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
        for known in [name for name in self._keys if name[0] == vector_id]:
            del self._keys[known]

    def __contains__(self, vector_id: object) -> bool:
        return vector_id in self._vectors

    def asked(self, steering: SteerBy | Sequence[SteerBy] | None) -> Carried:
        """What a request that is to be steered so carries.

        Raises:
            NotFoundError: an id that nobody registered.
            ValidationError: a layer that the vector hasn't, tokens or strengths that are none, or too many vectors.
        """
        items = [steering] if isinstance(steering, SteerBy) else list(steering or ())
        edits: list[AskedEdit] = []
        missing: dict[str, bytes] = {}
        for item in items:
            known = self._vectors.get(item.vector)
            if known is None:
                raise NotFoundError(f"no steering vector has the id {item.vector!r} here.")
            strength = _strength(item.strength)
            tokens = as_scope(known.tokens if item.tokens is None else item.tokens)
            layers = self._layers(item, known)
            if not strength:
                continue
            for i, part in enumerate(known.parts):
                chosen = tuple(layer for layer in layers if layer in part.edits)
                if not chosen:
                    continue
                key, data = self._unit((item.vector, i, chosen), part, strength)
                edits.append(AskedEdit(key, strength if part.strength == "multiplies" else 1.0, tokens))
                if data is not None:
                    missing[key] = data
        if len(edits) > self.capacity.per_token:
            raise ValidationError(
                f"a request steers by {len(edits)} vectors (one that clamps counts twice), and this engine was started "
                f"for {self.capacity.per_token}: start it with steering_per_token={len(edits)}."
            )
        fields = {FIELD: as_text(edits)} if edits else {}
        return Carried(fields, tuple({one.key for one in edits}), missing)

    def _layers(self, item: SteerBy, known: KnownVector) -> tuple[int, ...]:
        if item.layers is None:
            return known.layers
        layers = tuple(sorted({layer_number(layer, self.n_layers) for layer in item.layers}))
        missing = [layer for layer in layers if layer not in known.layers]
        if missing or not layers:
            raise ValidationError(
                f"the vector {item.vector!r} has layers {list(known.layers)}, and not {missing or 'none'}."
            )
        return layers

    def _unit(
        self, name: tuple[str, int, tuple[int, ...]], part: VectorPart, strength: float
    ) -> tuple[str, bytes | None]:
        """The key of some layers of a part, and, where the workers don't hold it, what they are sent."""
        full = (*name, strength if part.strength == "shapes" else 1.0)
        key = self._keys.get(full)
        if key is not None and key in self.held:
            self._keys.move_to_end(full)
            return key, None
        edits = part.made(strength)
        data = packed({layer: edits[layer] for layer in name[2]})
        key = self._keys[full] = key_of(data)
        if len(self._keys) > _MOST_NAMES:
            self._keys.popitem(last=False)
        return key, None if key in self.held else data


def _content(known: KnownVector) -> str:
    """The hash of what a vector does."""
    data = [packed(part.edits) for part in known.parts]
    said = repr((known.tokens, [part.strength for part in known.parts]))
    return key_of(b"".join([*data, said.encode()]))


def _strength(strength: object) -> float:
    if isinstance(strength, bool) or not isinstance(strength, (int, float)) or not abs(strength) < 1e9:
        raise ValidationError(f"a strength is a finite number; got {strength!r}.")
    return float(strength)
