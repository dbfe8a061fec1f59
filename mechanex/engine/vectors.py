"""Steering vectors as values: one direction per layer, with algebra, a record of their origin, and files."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from .._version import __version__
from ..errors import ValidationError
from .dose_record import FIELD as CALIBRATION
from .dose_record import DoseRecord
from .formats.files import TERMS, read_layers, write_layers
from .formats.record import FORMAT_VERSION, TERMS_VERSION
from .formats.site import Site
from .given import as_number
from .intervention import Edit, widest
from .projecting import projections
from .prompt_conditions import PromptCondition
from .schedules import Schedule, Varying
from .terms import TOKENS, Terms, TokenGate
from .vector_checks import (
    RESERVED_FIELDS,
    MissingLayer,
    as_direction,
    as_layer,
    as_seed,
    as_text_fields,
    check_strength,
    written_seed,
)
from .vector_shown import shown_norms, vector_html

if TYPE_CHECKING:
    from torch import nn

    from .hooks import Handle, Intervention, SteeringPlan
    from .models.adapter import ModelAdapter

__all__ = ["FORMAT_VERSION", "SITE", "SteeringVector"]

_T = TypeVar("_T")

SITE = "resid_pre"
"""The residual stream entering a block, and leaving the last one as if another came: the only site there is."""


class SteeringVector(Mapping[int, Tensor]):
    """One direction of the residual stream per layer; immutable, with vector algebra.

    ``2 * a - b``, ``-a`` and ``a / 2`` act layer by layer; a sum covers the union of the layers, and a layer
    that only one side has stays as it is. ``==`` compares layers and numbers exactly; see also ``allclose``.

    Args:
        layers: ``{layer: [d] or [1, d]}``, tensors of floating numbers, NumPy arrays or lists; layers 0 and up, all of
            one width, finite. Detached copies are kept in float32, or float64 when any of them is.
        model: id of the model that it was made for.
        model_family: that model's architecture (``"llama"``); where it is known, models of another are refused.
        method: how it was made, such as ``"caa"``.
        seed: the seed of its random draws, where there were any.
        site: where in a layer it acts; ``"resid_pre"``, the residual stream entering the block.
        metadata: further text fields, kept in safetensors and GGUF files.
        library_version: the version that made it; this one by default.
        terms: when and how it acts, beyond being added to every token; see ``when``, ``rotating``, ``scheduled``.

    Raises:
        ValidationError: no layers, a negative layer, different widths, NaN or infinite numbers, another site.
    """

    __array_ufunc__ = None  # lets `numpy.float64(2) * vector` come to __rmul__

    def __init__(
        self,
        layers: Mapping[int, Any],
        *,
        model: str | None = None,
        model_family: str | None = None,
        method: str | None = None,
        seed: int | None = None,
        site: str = SITE,
        metadata: Mapping[str, str] | None = None,
        library_version: str = __version__,
        terms: Terms | None = None,
    ) -> None:
        if not isinstance(layers, Mapping) or not layers:
            raise ValidationError(
                f"a steering vector needs {{layer: tensor}} with at least one layer; got {layers!r:.100}."
            )
        if site != SITE:
            raise ValidationError(
                f"the site of a steering vector is {SITE!r} (the stream entering a block); got {site!r}."
            )
        checked = {as_layer(layer): as_direction(layer, tensor) for layer, tensor in layers.items()}
        if len(checked) < len(layers):
            raise ValidationError(f"a layer is named twice in {list(layers)}: keep one.")
        widths = {layer: tensor.numel() for layer, tensor in checked.items()}
        if len(set(widths.values())) > 1:
            raise ValidationError(f"all layers of a vector have one width; got {widths}.")
        double = any(tensor.dtype == torch.float64 for tensor in checked.values())
        dtype = torch.float64 if double else torch.float32
        self._layers = {layer: checked[layer].to(dtype, copy=True) for layer in sorted(checked)}
        self.model = model
        self.model_family = model_family
        self.method = method
        self.seed = as_seed(seed)
        self.site = site
        self.library_version = library_version
        self.metadata = as_text_fields(metadata or {})
        self.terms = (terms or Terms()).among(self._layers)
        _check_terms(self.terms, self.width)
        self._digest: bytes | None = None

    def __getitem__(self, layer: int) -> Tensor:
        if layer not in self._layers:
            raise MissingLayer(
                f"the vector has no layer {layer!r}: it has {', '.join(map(str, self._layers))} (counted from 0)."
            )
        return self._layers[layer].clone()

    def __iter__(self) -> Iterator[int]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers, in order."""
        return tuple(self._layers)

    @property
    def width(self) -> int:
        """Width d of the residual stream that it fits."""
        return self._any.numel()

    @property
    def dtype(self) -> torch.dtype:
        """``torch.float32`` or ``torch.float64``."""
        return self._any.dtype

    @property
    def device(self) -> torch.device:
        """Where its tensors are; applying it copies them to the model's device."""
        return self._any.device

    @property
    def tokens(self) -> str:
        """Which tokens it edits where nobody says: ``"all"``, ``"generated"`` or ``"prompt"``; see ``on_tokens``."""
        return self.terms.tokens

    @property
    def calibration(self) -> DoseRecord | None:
        """What ``calibrate`` or ``tune`` saw at which strength; None where neither was called."""
        text = self.metadata.get(CALIBRATION)
        return None if text is None else DoseRecord.of(text)

    @property
    def _any(self) -> Tensor:
        return next(iter(self._layers.values()))

    def __repr__(self) -> str:
        made = {"method": self.method, "model": self.model}
        origin = "".join(f", {name}={value!r}" for name, value in made.items() if value)
        on = f", terms={self.terms.text()}" if self.terms and not self._by_function else ""
        return f"SteeringVector(width={self.width}, norms={shown_norms(self.norms())}{origin}{on})"

    def _repr_html_(self) -> str:
        """For notebooks: what it is, and the norm of each layer as a bar."""
        return vector_html(repr(self), self.norms())

    @property
    def _by_function(self) -> bool:
        return self.terms.schedule is not None and self.terms.schedule.function is not None

    # Algebra

    def __add__(self, other: object) -> SteeringVector:
        if isinstance(other, (int, float)) and other == 0:  # so that sum([a, b]) works
            return self
        if not isinstance(other, SteeringVector):
            return NotImplemented
        self._check_width(other)
        joined = {layer: tensor.to(self.device) for layer, tensor in other._layers.items()}
        for layer, tensor in self._layers.items():
            joined[layer] = tensor + joined[layer] if layer in joined else tensor
        return SteeringVector(joined, **self._common(other))

    __radd__ = __add__

    def __sub__(self, other: object) -> SteeringVector:
        return self + -other if isinstance(other, SteeringVector) else NotImplemented

    def __neg__(self) -> SteeringVector:
        return self * -1

    def __mul__(self, factor: object) -> SteeringVector:
        number = as_number(factor)
        if number is None:
            return NotImplemented
        if not math.isfinite(number):
            raise ValidationError(f"a steering vector can be multiplied by a finite number; got {number}.")
        return self._scaled(number, {layer: tensor * number for layer, tensor in self._layers.items()})

    __rmul__ = __mul__

    def __truediv__(self, divisor: object) -> SteeringVector:
        number = as_number(divisor)
        if number is None:
            return NotImplemented
        if number == 0:
            raise ValidationError("a steering vector can't be divided by zero.")
        return self._scaled(1 / number, {layer: tensor / number for layer, tensor in self._layers.items()})

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SteeringVector):
            return NotImplemented
        return self.layers == other.layers and all(
            torch.equal(tensor, other._layers[layer].to(tensor)) for layer, tensor in self._layers.items()
        )

    __hash__ = None  # type: ignore[assignment]

    def allclose(self, other: SteeringVector, *, rtol: float = 1e-5, atol: float = 1e-8) -> bool:
        """Whether both have the same layers and, within ``torch.allclose``'s tolerances, the same numbers."""
        return self.layers == other.layers and all(
            tensor.shape == other._layers[layer].shape
            and torch.allclose(tensor, other._layers[layer].to(tensor), rtol=rtol, atol=atol)
            for layer, tensor in self._layers.items()
        )

    def norms(self) -> dict[int, float]:
        """Euclidean norm of each layer's direction."""
        return {layer: float(tensor.cpu().double().norm()) for layer, tensor in self._layers.items()}

    def norm(self) -> float:
        """Euclidean norm over all layers together; the norm of the direction when there is one layer."""
        return math.hypot(*self.norms().values())

    def normalized(self) -> SteeringVector:
        """Every layer's direction at norm 1.

        Raises:
            ValidationError: a layer is zero and has no direction.
        """
        self._check_nonzero("normalized")
        unit = {}
        for layer, tensor in self._layers.items():
            wide = tensor.to(widest(tensor.device))
            unit[layer] = (wide / wide.norm()).to(tensor.dtype)
        return self._like(unit, self._uncalibrated())

    def cosine_similarity(self, other: Mapping[int, Any]) -> dict[int, float]:
        """Cosine of the angle between this and another vector or ``{layer: [d]}``, for each layer that both have.

        Raises:
            ValidationError: different widths, no layer in common, or a zero direction.
        """
        other = other if isinstance(other, SteeringVector) else SteeringVector(other)
        self._check_width(other)
        shared = [layer for layer in self._layers if layer in other._layers]
        if not shared:
            raise ValidationError(
                f"no layer in common: one has {list(self.layers)}, the other {list(other.layers)}."
            )
        self._check_nonzero("compared by angle", shared)
        other._check_nonzero("compared by angle", shared)
        ours = self.normalized() if len(shared) == len(self) else self.restricted(shared).normalized()
        theirs = other.restricted(shared).normalized()
        return {layer: float(ours._layers[layer] @ theirs._layers[layer].to(ours._any)) for layer in shared}

    def project(self, activations: Mapping[int, Any]) -> dict[int, Any]:
        """The projections x·v̂ of activations on the vector, in the units of the stream.

        Args:
            activations: ``{layer: [n, d]}`` as ``model.activations`` gives them, memory-mapped ones too; or [n, T, d].

        Returns:
            ``{layer: array [n]}``, or [n, T], for each layer that both have; float64 for activations in it.

        Raises:
            ValidationError: no layer in common, another width, something else than numbers, or a zero direction.
        """
        return projections(self._layers, activations)

    def restricted(self, layers: Sequence[int]) -> SteeringVector:
        """The same vector at some of its layers only; a layer it hasn't is a ValidationError."""
        missing = [layer for layer in layers if layer not in self._layers]
        if missing:
            raise ValidationError(f"the vector has layers {list(self.layers)}, and not {missing}.")
        kept = {layer: self._layers[layer] for layer in layers}
        return self._like(kept, None if len(kept) == len(self) else self._uncalibrated())

    def noted(self, **fields: str) -> SteeringVector:
        """The same vector with further text fields in its ``metadata``."""
        return self._like(self._layers, {**self.metadata, **fields})

    def to(self, target: torch.device | torch.dtype | str) -> SteeringVector:
        """The same vector on another device, or in float32 or float64; a smaller dtype is refused."""
        if isinstance(target, torch.dtype) and target not in (torch.float32, torch.float64):
            raise ValidationError(f"steering vectors are float32 or float64; got {target}.")
        return self._like({layer: tensor.to(target) for layer, tensor in self._layers.items()})

    # Use

    def apply(
        self,
        model: nn.Module | ModelAdapter,
        strength: float = 1.0,
        tokens: int | slice | None = None,
        rows: Sequence[int] | None = None,
    ) -> Handle:
        """Adds ``strength`` times the vector to the stream at its layers, until the handle is removed.

        Args:
            model: a Hugging Face or TransformerLens model.
            strength: multiplies the vector; 0 changes nothing and logs a warning.
            tokens: absolute positions to steer (int, slice, or None for those that the vector names).
            rows: rows of the batch to steer, None for all.

        Returns:
            A handle that is a context manager and has ``.remove()``.

        Raises:
            ValidationError: a strength that is not finite or makes the vector infinite, a layer that the model
                hasn't, another width, or a vector that says it is of another family.
        """
        return self.plan(model, strength, tokens, rows).apply(model)

    def digest(self) -> bytes:
        """[16] bytes that are the same for vectors that do the same; computed once."""
        if self._digest is None:
            digest = hashlib.blake2b(self.terms.text().encode(), digest_size=16)
            for name, tensor in (*self._layers.items(), *self.terms.tensors().items()):
                digest.update(f"{name}:{tensor.dtype}:{tensor.numel()};".encode())
                digest.update(tensor.cpu().numpy().tobytes())
            self._digest = digest.digest()
        return self._digest

    def plan(
        self,
        model: nn.Module | ModelAdapter,
        strength: float = 1.0,
        tokens: int | slice | None = None,
        rows: Sequence[int] | None = None,
    ) -> SteeringPlan:
        """What ``apply`` does, checked but not yet applied; arguments and errors as there."""
        from .hooks import SteeringPlan
        from .models import adapter_for

        adapter = adapter_for(model)
        self.check(adapter, strength)
        return SteeringPlan(self.interventions(adapter, strength, tokens, rows))

    def interventions(
        self,
        adapter: ModelAdapter,
        strength: float,
        tokens: int | slice | None = None,
        rows: Sequence[int] | None = None,
    ) -> list[Intervention]:
        """What ``plan`` holds; ``check`` says whether it can be used."""
        from .hooks import Intervention

        tokens = TOKENS[self.tokens] if tokens is None else tokens
        terms, found = self.terms, []
        for layer, tensor in self._layers.items():
            edit, varying = terms.edit(layer, tensor, strength), None
            if terms.schedule is not None:
                varying = Varying(terms.schedule, _ScheduledEdit(terms, layer, tensor, strength))
            at = adapter.layer_index(layer)
            found.append(
                Intervention(at, edit, tokens=tokens, rows=rows, varying=varying, condition=terms.condition)
            )
        return found

    def check(self, adapter: ModelAdapter, strength: float = 1.0) -> None:
        """Raises a ValidationError where this vector can't steer this model so strongly; logs where it is untried."""
        check_strength(strength)
        if self.width != adapter.d_model:
            made_for = f" (this one was made for {self.model})" if self.model else ""
            raise ValidationError(
                f"the vector is {self.width} wide and the residual stream of {adapter.model_id} "
                f"{adapter.d_model}: use a vector of this model{made_for}."
            )
        if None not in (self.model_family, adapter.family) and self.model_family != adapter.family:
            raise ValidationError(
                f"the vector was made for a model of the family {self.model_family!r} ({self.model or 'unnamed'}), and "
                f"{adapter.model_id} is of {adapter.family!r}: use a vector of this family, or "
                "SteeringVector(dict(vector)) to try its numbers all the same."
            )
        if self.calibration is not None:
            self.calibration.warn(float(strength))

    # Terms

    def when(self, condition: PromptCondition | TokenGate | Mapping[int, TokenGate]) -> SteeringVector:
        """The same vector under a condition.

        Args:
            condition: of prompts: a text is steered, its prompt too, if its prompt meets it, and is exactly what it is
                without the vector if not; or of each token: gates that it opens, for every layer or by layer.

        Raises:
            ValidationError: another width, or gates of layers that have one.
        """
        if isinstance(condition, PromptCondition):
            return self._on(replace(self.terms, condition=condition))
        by_layer = (
            dict(condition) if isinstance(condition, Mapping) else dict.fromkeys(self._layers, condition)
        )
        if twice := [layer for layer in by_layer if layer in self.terms.gates]:
            raise ValidationError(f"the vector has a gate at layers {twice} already, and a layer has one.")
        self.restricted(list(by_layer))
        return self._on(replace(self.terms, gates={**self.terms.gates, **by_layer}))

    def keeping_norm(self) -> SteeringVector:
        """The same vector, added so that every edited token keeps the norm that it had."""
        return self.when(TokenGate("norm"))

    def clamping(self) -> SteeringVector:
        """The same vector as a clamp: the projection on it becomes strength times its norm, whatever it was."""
        return self._on(replace(self.terms, clamps=True))

    def on_tokens(self, tokens: str) -> SteeringVector:
        """The same vector for some tokens only, where nobody says which.

        Args:
            tokens: ``"all"``; ``"generated"``, those that an answer is predicted from, the prompt's last one included;
                or ``"prompt"``, those before.
        """
        return self._on(replace(self.terms, tokens=tokens))

    def scheduled(
        self, strengths: Sequence[float] | Callable[[int], float], *, prompt: float | None = None
    ) -> SteeringVector:
        """The same vector with a strength that changes along a text.

        Args:
            strengths: multiply the strength where the answer's tokens 0, 1, 2, … are chosen, the last one going on; or
                a function of that number, which is negative in the prompt.
            prompt: multiplies it in the prompt, but for its last token; None for the first of the list.
        """
        return self._on(replace(self.terms, schedule=Schedule(strengths, prompt=prompt)))

    def rotating(self, other: Mapping[int, Any], degrees: float) -> SteeringVector:
        """The same vector as a rotation: the stream is turned by ``degrees`` in the plane of ``other`` and the vector.

        What stands outside of the plane and the stream's norm stay as they are.

        Args:
            other: ``{layer: [d]}``, or a vector, what is turned towards this one.
            degrees: by how much, at strength 1.

        Raises:
            ValidationError: a layer without a second vector, or one that is parallel to the first.
        """
        if missing := [layer for layer in self._layers if layer not in other]:
            raise ValidationError(
                f"a rotation needs a second vector at every layer; there is none at {missing}."
            )
        planes = {layer: as_direction(layer, other[layer]).to(self._any) for layer in self._layers}
        for layer, tensor in self._layers.items():
            Edit.rotate(tensor, planes[layer], degrees)
        return self._on(replace(self.terms, planes=planes, degrees=float(degrees)))

    @classmethod
    def capping(
        cls,
        directions: Mapping[int, Any],
        *,
        at_most: float | None = None,
        at_least: float | None = None,
        **said: Any,
    ) -> SteeringVector:
        """A vector that, at strength 1, holds projections on one side of a bound and leaves other tokens alone.

        Args:
            directions: ``{layer: [d]}``; their norms don't count.
            at_most, at_least: the bound of the projection x·v̂, one of them, in the units of the stream.
            said: keyword arguments of ``SteeringVector``.
        """
        layers, gates = {}, {}
        for layer, direction in SteeringVector(directions)._layers.items():
            edit = Edit.cap(direction, at_most=at_most, at_least=at_least)
            assert edit.gate is not None
            layers[layer] = edit.bias
            gates[layer] = TokenGate("relu", edit.gate.weight[0], float(edit.gate.offset))
        return cls(layers, terms=Terms(gates=gates), **said)

    def _on(self, terms: Terms) -> SteeringVector:
        found = self._like(self._layers, self._uncalibrated())
        found.terms = terms
        _check_terms(terms, self.width)
        return found

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the vector: ``.safetensors`` keeps all, ``.gguf`` float32 and text, ``.json`` numbers only.

        Raises:
            ValidationError: an unknown suffix, or layer 0 in GGUF, which has no name for it.
        """
        write_layers(path, self._layers, self._fields(), self.terms.tensors())

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, site: Site | None = None) -> SteeringVector:
        """Reads a vector from ``.safetensors``, ``.json`` or ``.gguf``, its own or another tool's.

        Args:
            path: the file.
            site: what the numbers in a file of another tool mean, where it doesn't say so itself: ``"input"``, the
                stream that enters block N, this library's layer N; ``"output"``, what block N gives, as Hugging Face
                modules do, this library's layer N + 1.

        Raises:
            NotFoundError: there is no such file.
            ValidationError: the file is not a sound vector file, its content isn't what its checksum and metadata
                say, or ``site`` is missing or contradicts the file; names the file and the problem.
        """
        layers, fields, more = read_layers(path, site)
        # In another tool's file these names say nothing of ours.
        ours = {TERMS, "format_version"} <= fields.keys()
        if more and not ours:
            raise ValidationError(
                f"{path} has tensors that are no layers and that nothing explains: {', '.join(more)[:100]}."
            )
        try:
            return cls(
                layers,
                model=fields.get("model"),
                model_family=fields.get("model_family"),
                method=fields.get("method"),
                seed=written_seed(path, fields.get("seed")),
                metadata={key: value for key, value in fields.items() if key not in RESERVED_FIELDS},
                library_version=fields.get("library_version", ""),
                terms=Terms.read(fields[TERMS], more) if ours else None,
            )
        except ValueError as error:
            raise ValidationError(f"{path} is not a usable vector file: {error}") from error

    def _fields(self) -> dict[str, str]:
        fields = {
            "format_version": TERMS_VERSION if self.terms else FORMAT_VERSION,
            "library_version": self.library_version,
            "width": str(self.width),
            "layers": ",".join(map(str, self._layers)),
            "site": self.site,
        }
        optional = {
            "model": self.model,
            "model_family": self.model_family,
            "method": self.method,
            "seed": self.seed,
            TERMS: self.terms.text() if self.terms else None,
        }
        fields |= {key: str(value) for key, value in optional.items() if value is not None}
        return fields | self.metadata

    def _scaled(self, factor: float, layers: dict[int, Tensor]) -> SteeringVector:
        """Itself times ``factor``, given as ``layers``: what was calibrated is at other strengths."""
        turned = replace(self.terms, degrees=self.terms.degrees * factor) if self.terms.planes else None
        if turned is not None:  # its strength is the angle
            layers = self._layers
        found, metadata = self.calibration, None
        if found is not None:
            record = {} if factor == 0 else {CALIBRATION: found.scaled(factor).text()}
            metadata = self._uncalibrated() | record
        scaled = self._like(layers, metadata)
        if turned is not None:
            scaled.terms = turned
        return scaled

    def _uncalibrated(self) -> dict[str, str]:
        return {key: value for key, value in self.metadata.items() if key != CALIBRATION}

    def _like(self, layers: dict[int, Tensor], metadata: Mapping[str, str] | None = None) -> SteeringVector:
        return SteeringVector(
            layers,
            model=self.model,
            model_family=self.model_family,
            method=self.method,
            seed=self.seed,
            site=self.site,
            metadata=self.metadata if metadata is None else metadata,
            terms=self.terms,
        )

    def _common(self, other: SteeringVector) -> dict[str, Any]:
        return {
            "model": _agreed(self.model, other.model),
            "model_family": _agreed(self.model_family, other.model_family),
            "method": _agreed(self.method, other.method),
            "seed": _agreed(self.seed, other.seed),
            "metadata": dict(self._uncalibrated().items() & other.metadata.items()),
            "terms": self._common_terms(other),
        }

    def _common_terms(self, other: SteeringVector) -> Terms:
        # Of rotations the angle is the strength, which a sum of directions doesn't change.
        if self.terms.planes or not self.terms.same_as(other.terms):
            raise ValidationError(
                "rotations, and vectors on different terms (gates, schedules or conditions), don't add up to one: "
                "apply both, or take their numbers, SteeringVector(dict(vector))."
            )
        return self.terms

    def _check_width(self, other: SteeringVector) -> None:
        if self.width != other.width:
            raise ValidationError(
                f"vectors of widths {self.width} and {other.width} don't combine: their models differ."
            )

    def _check_nonzero(self, purpose: str, layers: Sequence[int] | None = None) -> None:
        zero = [layer for layer in layers or self.layers if not self._layers[layer].any()]
        if zero:
            raise ValidationError(f"the vector is zero at layers {zero} and can't be {purpose} there.")


@dataclass(frozen=True)
class _ScheduledEdit:
    """From the strength at a place of a schedule to a vector's edit of a layer."""

    terms: Terms
    layer: int
    direction: Tensor
    strength: float

    def __call__(self, scheduled: float) -> Edit:
        return self.terms.edit(self.layer, self.direction, scheduled * self.strength)


def _check_terms(terms: Terms, width: int) -> None:
    for name, tensor in terms.tensors().items():
        if tensor.numel() != width:
            raise ValidationError(
                f"the vector is {width} wide, and the {name} of its terms {tensor.numel()}: use those of one model."
            )


def _agreed(ours: _T | None, theirs: _T | None) -> _T | None:
    if ours is None or theirs is None:
        return theirs if ours is None else ours
    return ours if ours == theirs else None
