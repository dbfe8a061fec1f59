"""The terms on which a vector acts: gates that each token opens, a plane to turn in, a schedule, a condition."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import ValidationError
from ..ops.gate import KINDS
from .given import as_vector
from .intervention import Edit
from .positions import TokenSelector
from .prompt_conditions import PromptCondition
from .schedules import Schedule

__all__ = ["TOKENS", "Terms", "TokenGate", "check_token_kind"]

TOKENS: dict[str, TokenSelector] = {"all": None, "generated": slice(-1, None), "prompt": slice(0, -1)}
"""Tokens by name. generated: those that an answer is predicted from, the prompt's last one and the answer's own;
prompt: those before."""

_SEEING = ("step", "sigmoid", "relu")


def check_token_kind(tokens: str) -> None:
    """Raises a ValidationError for a name of tokens that there is none of."""
    if tokens not in TOKENS:
        raise ValidationError(
            f"the tokens to steer are one of {', '.join(map(repr, TOKENS))}; got {tokens!r}."
        )


@dataclass(frozen=True, eq=False)
class TokenGate:
    """How far each token opens an edit: by q = x·weight + offset, with x the stream that the edit finds there.

    Args:
        kind: ``"step"``: 1 where q > 0, else 0; ``"sigmoid"``: 1/(1 + e⁻ᵠ); ``"relu"``: max(q, 0); ``"norm"``: open,
            and the edited x keeps its norm; ``"none"``: open.
        weight: [d_model]; None for ``"norm"`` and ``"none"``.
        offset: one number.

    Raises:
        ValidationError: an unknown kind, or a weight that is missing or not finite.
    """

    kind: str
    weight: Tensor | None = None
    offset: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValidationError(f"a gate is one of {', '.join(map(repr, KINDS))}; got {self.kind!r}.")
        if (self.weight is None) == (self.kind in _SEEING):
            needs = "needs a weight to see a token with" if self.kind in _SEEING else "looks at no token"
            raise ValidationError(
                f"a {self.kind} gate {needs}; got {'none' if self.weight is None else 'one'}."
            )
        object.__setattr__(self, "offset", float(self.offset))
        if self.weight is not None:
            weight = as_vector("a gate's weight", self.weight).detach()
            weight = weight if weight.dtype == torch.float64 else weight.float()
            object.__setattr__(self, "weight", weight)
            if not bool(torch.isfinite(weight).all()):
                raise ValidationError("a gate's weight holds NaN or infinite numbers.")

    @classmethod
    def above(cls, direction: Tensor, threshold: float) -> TokenGate:
        """Open for the tokens whose projection x·v̂ is above the threshold; ``direction`` is v [d_model]."""
        v = as_vector("a direction", direction).float()
        return cls("step", v / v.norm(), -float(threshold))


@dataclass(frozen=True, eq=False)
class Terms:
    """When and how a vector acts, beyond being added to every token.

    Args:
        gates: by layer.
        planes: by layer, the second vector [d_model] of the plane in which the stream is turned, towards the first.
        degrees: by how much strength 1 turns it.
        schedule: multiplies the strength along a text.
        condition: has to be met by a prompt for its text to be steered at all.
        clamps: the projection on the vector becomes the vector's norm, in place of an addition.
        tokens: which it edits where nobody says; one of ``TOKENS``.

    Raises:
        ValidationError: another name of tokens.
    """

    gates: Mapping[int, TokenGate] = field(default_factory=dict)
    planes: Mapping[int, Tensor] = field(default_factory=dict)
    degrees: float = 0.0
    schedule: Schedule | None = None
    condition: PromptCondition | None = None
    clamps: bool = False
    tokens: str = "all"

    def __post_init__(self) -> None:
        check_token_kind(self.tokens)

    def __bool__(self) -> bool:
        acts = self.gates or self.planes or self.schedule or self.condition or self.clamps
        return bool(acts) or self.tokens != "all"

    @property
    def multiply(self) -> bool:
        """Whether strength multiplies what a vector does: what it does at one is that at 1, so many times."""
        return not (self.planes or self.schedule or self.clamps)

    def among(self, layers: Mapping[int, Any]) -> Terms:
        """Those of some layers."""
        return replace(
            self,
            gates={layer: gate for layer, gate in self.gates.items() if layer in layers},
            planes={layer: plane for layer, plane in self.planes.items() if layer in layers},
        )

    def same_as(self, other: Terms) -> bool:
        """Whether they let a vector act alike."""
        ours, theirs = self.tensors(), other.tensors()
        functions = [terms.schedule and terms.schedule.function for terms in (self, other)]
        if functions[0] is not functions[1] or ours.keys() != theirs.keys():
            return False
        rest = [self, other]
        if functions[0] is not None:
            rest = [replace(terms, schedule=None) for terms in rest]
        return rest[0].text() == rest[1].text() and all(
            torch.equal(tensor, theirs[name].to(tensor)) for name, tensor in ours.items()
        )

    def edit(self, layer: int, direction: Tensor, strength: float) -> Edit:
        """The edit of a layer at a strength.

        Args:
            layer: which one.
            direction: [d_model] of the vector at strength 1.
            strength: what the vector is multiplied by.
        """
        gate, plane = self.gates.get(layer), self.planes.get(layer)
        if plane is not None:
            found = Edit.rotate(direction, plane, self.degrees * strength)
        elif self.clamps and strength:
            found = Edit.clamp(direction * strength, 1.0)
        else:
            found = Edit.add(direction * strength)
        return found if gate is None else found.gated(gate.kind, gate.weight, gate.offset)

    # Files

    def tensors(self) -> dict[str, Tensor]:
        """Their tensors by name; none of the names is one of a layer."""
        found = {f"gate.{layer}": gate.weight for layer, gate in self.gates.items()}
        found |= {f"plane.{layer}": plane for layer, plane in self.planes.items()}
        if self.condition is not None:
            found["condition"] = self.condition.weight
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def text(self) -> str:
        """What is no tensor of them, as JSON.

        Raises:
            ValidationError: a schedule that is a function.
        """
        said: dict[str, Any] = {}
        if self.gates:
            said["gates"] = {str(n): {"kind": g.kind, "offset": g.offset} for n, g in self.gates.items()}
        if self.planes:
            said["degrees"] = self.degrees
        if self.schedule is not None:
            said["schedule"] = self.schedule.said()
        if self.condition is not None:
            said["condition"] = self.condition.said()
        if self.clamps:
            said["clamps"] = True
        if self.tokens != "all":
            said["tokens"] = self.tokens
        return json.dumps(said)

    @classmethod
    def read(cls, text: str, tensors: Mapping[str, Tensor]) -> Terms:
        """What :meth:`text` and :meth:`tensors` gave.

        Raises:
            ValueError: they don't belong together.
        """
        said = json.loads(text)
        left = dict(tensors)
        try:
            gates = {
                int(n): TokenGate(one["kind"], left.pop(f"gate.{n}", None), one["offset"])
                for n, one in said.get("gates", {}).items()
            }
            planes = {
                int(name.removeprefix("plane.")): left.pop(name) for name in tensors if name[:6] == "plane."
            }
            schedule, condition = said.get("schedule"), said.get("condition")
            made = cls(
                gates,
                planes,
                float(said.get("degrees", 0.0)),
                None if schedule is None else Schedule(**schedule),
                None if condition is None else PromptCondition(weight=left.pop("condition"), **condition),
                bool(said.get("clamps", False)),
                str(said.get("tokens", "all")),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"its terms are not complete: {error}") from error
        if left:
            raise ValueError(f"its terms don't speak of {', '.join(sorted(left))[:100]}")
        return made
