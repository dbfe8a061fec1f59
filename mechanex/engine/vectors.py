"""Steering vectors as values: one direction per layer, with algebra, a record of their origin, and files."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from .._version import __version__
from ..errors import ValidationError
from .formats.files import read_layers, write_layers
from .formats.record import FORMAT_VERSION
from .formats.site import Site
from .given import as_number
from .intervention import widest
from .vector_checks import (
    RESERVED_FIELDS,
    as_direction,
    as_layer,
    as_seed,
    as_text_fields,
    check_strength,
    written_seed,
)

if TYPE_CHECKING:
    from torch import nn

    from .hooks import Handle, SteeringPlan
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
    ) -> None:
        if not isinstance(layers, Mapping) or not layers:
            raise ValidationError(
                f"a steering vector needs {{layer: tensor}} with at least one layer; got {layers!r}."
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

    def __getitem__(self, layer: int) -> Tensor:
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
    def _any(self) -> Tensor:
        return next(iter(self._layers.values()))

    def __repr__(self) -> str:
        norms = ", ".join(f"{layer}: {norm:.4g}" for layer, norm in self.norms().items())
        made = {"model": self.model, "method": self.method}
        origin = "".join(f", {name}={value!r}" for name, value in made.items() if value)
        return f"SteeringVector(width={self.width}, norms={{{norms}}}{origin})"

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
        return self._like({layer: tensor * number for layer, tensor in self._layers.items()})

    __rmul__ = __mul__

    def __truediv__(self, divisor: object) -> SteeringVector:
        number = as_number(divisor)
        if number is None:
            return NotImplemented
        if number == 0:
            raise ValidationError("a steering vector can't be divided by zero.")
        return self._like({layer: tensor / number for layer, tensor in self._layers.items()})

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
        return self._like(unit)

    def cosine_similarity(self, other: SteeringVector) -> dict[int, float]:
        """Cosine of the angle between the two, for each layer that both have.

        Raises:
            ValidationError: different widths, no layer in common, or a zero direction.
        """
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

    def restricted(self, layers: Sequence[int]) -> SteeringVector:
        """The same vector at some of its layers only; a layer it hasn't is a ValidationError."""
        missing = [layer for layer in layers if layer not in self._layers]
        if missing:
            raise ValidationError(f"the vector has layers {list(self.layers)}, and not {missing}.")
        return self._like({layer: self._layers[layer] for layer in layers})

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
            tokens: absolute positions to steer (int, slice, or None for all).
            rows: rows of the batch to steer, None for all.

        Returns:
            A handle that is a context manager and has ``.remove()``.

        Raises:
            ValidationError: a strength that is not finite or makes the vector infinite, a layer that the model
                hasn't, another width, or a vector that says it is of another family.
        """
        return self.plan(model, strength, tokens, rows).apply(model)

    def plan(
        self,
        model: nn.Module | ModelAdapter,
        strength: float = 1.0,
        tokens: int | slice | None = None,
        rows: Sequence[int] | None = None,
    ) -> SteeringPlan:
        """What ``apply`` does, checked but not yet applied; arguments and errors as there."""
        from .hooks import Intervention, SteeringPlan
        from .intervention import Edit
        from .models import adapter_for

        check_strength(strength)
        adapter = adapter_for(model)
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
        return SteeringPlan(
            Intervention(adapter.layer_index(layer), Edit.add(tensor), tokens=tokens, rows=rows)
            for layer, tensor in (self * strength)._layers.items()
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the vector: ``.safetensors`` keeps all, ``.gguf`` float32 and text, ``.json`` numbers only.

        Raises:
            ValidationError: an unknown suffix, or layer 0 in GGUF, which has no name for it.
        """
        write_layers(path, self._layers, self._fields())

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
        layers, fields = read_layers(path, site)
        try:
            return cls(
                layers,
                model=fields.get("model"),
                model_family=fields.get("model_family"),
                method=fields.get("method"),
                seed=written_seed(path, fields.get("seed")),
                metadata={key: value for key, value in fields.items() if key not in RESERVED_FIELDS},
                library_version=fields.get("library_version", ""),
            )
        except ValueError as error:
            raise ValidationError(f"{path} is not a usable vector file: {error}") from error

    def _fields(self) -> dict[str, str]:
        fields = {
            "format_version": FORMAT_VERSION,
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
        }
        fields |= {key: str(value) for key, value in optional.items() if value is not None}
        return fields | self.metadata

    def _like(self, layers: dict[int, Tensor]) -> SteeringVector:
        return SteeringVector(
            layers,
            model=self.model,
            model_family=self.model_family,
            method=self.method,
            seed=self.seed,
            site=self.site,
            metadata=self.metadata,
        )

    def _common(self, other: SteeringVector) -> dict[str, Any]:
        return {
            "model": _agreed(self.model, other.model),
            "model_family": _agreed(self.model_family, other.model_family),
            "method": _agreed(self.method, other.method),
            "seed": _agreed(self.seed, other.seed),
            "metadata": dict(self.metadata.items() & other.metadata.items()),
        }

    def _check_width(self, other: SteeringVector) -> None:
        if self.width != other.width:
            raise ValidationError(
                f"vectors of widths {self.width} and {other.width} don't combine: their models differ."
            )

    def _check_nonzero(self, purpose: str, layers: Sequence[int] | None = None) -> None:
        zero = [layer for layer in layers or self.layers if not self._layers[layer].any()]
        if zero:
            raise ValidationError(f"the vector is zero at layers {zero} and can't be {purpose} there.")


def _agreed(ours: _T | None, theirs: _T | None) -> _T | None:
    if ours is None or theirs is None:
        return theirs if ours is None else ours
    return ours if ours == theirs else None
