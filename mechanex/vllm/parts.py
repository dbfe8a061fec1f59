"""A vector as the tables of edits take it: what its strength multiplies, what it leaves alone, what it shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ..engine.intervention import Edit
from ..engine.terms import TOKENS
from ..engine.vectors import SteeringVector
from ..errors import ValidationError
from .asked import Scope

__all__ = ["KnownVector", "VectorPart", "edits_by_layer", "known_vector", "layer_number"]

Strength = Literal["multiplies", "none", "shapes"]


@dataclass(frozen=True)
class VectorPart:
    """Edits that are placed together, one for each layer.

    Args:
        edits: by layer, at strength 1.
        strength: what the vector's strength does with them: it multiplies what they change, it does nothing, or other
            strengths are other edits.
        at: the edits at a strength, where it shapes them.
    """

    edits: Mapping[int, Edit]
    strength: Strength = "multiplies"
    at: Callable[[float], Mapping[int, Edit]] | None = None

    def made(self, strength: float) -> Mapping[int, Edit]:
        """The edits at a strength, but for what it multiplies."""
        return self.edits if self.at is None else self.at(strength)


@dataclass(frozen=True)
class KnownVector:
    """What an id stands for.

    Args:
        parts: done one after another to each token.
        tokens: which they edit where a request doesn't say.
    """

    parts: tuple[VectorPart, ...]
    tokens: Scope = None

    @property
    def layers(self) -> tuple[int, ...]:
        """All layers that some part edits."""
        return tuple(sorted({layer for part in self.parts for layer in part.edits}))


def known_vector(source: object, n_layers: int) -> KnownVector:
    """What a user means by a vector, by ``{layer: tensor or Edit}``.

    Raises:
        ValidationError: it is neither, or one that changes along a text.
    """
    if not isinstance(source, SteeringVector):
        return KnownVector((VectorPart(edits_by_layer(source, n_layers)),))
    terms = source.terms
    if terms.schedule or terms.condition:
        raise ValidationError(
            "in vLLM a vector does the same all along a text, and this one has a schedule or a condition on prompts: "
            "serve it with mechanex serve, or take its numbers, SteeringVector(dict(vector))."
        )
    vectors = {layer: source[layer].float() for layer in source.layers}

    def shaped(layers: list[int], strength: float) -> dict[int, Edit]:
        return {n: terms.edit(n, vectors[n], strength) for n in layers}

    # A clamp takes the component out, whatever its strength, and adds the vector, which its strength multiplies; a gate
    # would look at the second of the two when the first is done.
    cleared = [n for n in vectors if terms.clamps and n not in terms.planes and n not in terms.gates]
    bent = [n for n in vectors if n in terms.planes or (terms.clamps and n not in cleared)]
    added = [n for n in vectors if n not in bent]
    parts = []
    if cleared:
        parts.append(VectorPart({n: Edit.ablate(vectors[n]) for n in cleared}, "none"))
    if added:
        plain = {n: Edit.add(vectors[n]) for n in cleared}
        parts.append(VectorPart({n: plain.get(n) or shaped([n], 1.0)[n] for n in added}))
    if bent:
        parts.append(VectorPart(shaped(bent, 1.0), "shapes", lambda strength: shaped(bent, strength)))
    return KnownVector(tuple(parts), TOKENS[terms.tokens])


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
        found[layer_number(layer, n_layers)] = edit.to(torch.device("cpu"), torch.float32)
    if len(found) < len(source):
        raise ValidationError(f"a layer is named twice in {list(source)}: keep one.")
    return dict(sorted(found.items()))


def layer_number(layer: Any, n_layers: int) -> int:
    """A layer counted from the first, negatives from the end.

    Raises:
        ValidationError: it isn't a whole number.
    """
    if isinstance(layer, bool) or not isinstance(layer, int):
        raise ValidationError(f"a layer is a whole number; got {layer!r}.")
    return layer if layer >= 0 else layer + n_layers
