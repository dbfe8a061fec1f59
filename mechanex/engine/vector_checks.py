"""What a steering vector is made of, checked: layer numbers, directions, text fields, strengths."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import ValidationError
from .given import as_finite, as_vector
from .whole import as_whole

__all__ = [
    "RESERVED_FIELDS",
    "MissingLayer",
    "as_direction",
    "as_layer",
    "as_seed",
    "as_text_fields",
    "check_strength",
    "written_seed",
]

_logger = logging.getLogger(__name__)

_NO_SEED = ("", "none", "null")
RESERVED_FIELDS = (
    "format_version",
    "library_version",
    "checksum",
    "model",
    "model_family",
    "width",
    "layers",
    "site",
    "method",
    "seed",
    "terms",
)


class MissingLayer(ValidationError, KeyError):
    """A layer that a vector hasn't; also a ``KeyError``, as of any mapping."""

    def __str__(self) -> str:  # a KeyError would show the quoted text
        return self.message


def check_strength(strength: float) -> None:
    """Refuses a strength that is not a finite number; warns about 0, which steers nothing."""
    value = as_finite(strength)
    if value is None:
        raise ValidationError(f"the steering strength must be a finite number; got {strength!r}.")
    if value == 0:
        _logger.warning("a steering vector was given with strength 0: nothing is steered")


def as_layer(layer: object) -> int:
    """A whole number from 0 up, of any integer type, as an int."""
    index = as_whole(layer)
    if index is None or index < 0:
        raise ValidationError(f"a vector's layers are whole numbers from 0 up; got {layer!r}.")
    return index


def as_seed(seed: object) -> int | None:
    """A whole number of any integer type as an int; None for None."""
    number = as_whole(seed)
    if number is None and seed is not None:
        raise ValidationError(f"the seed of a vector is a whole number, or None; got {seed!r}.")
    return number


def written_seed(path: str | os.PathLike[str], text: str | None) -> int | None:
    """The seed that a file names; None for what is no whole number, as other tools write where they have none."""
    if text is None:
        return None
    try:
        return int(text)
    except ValueError:
        if text.strip().lower() not in _NO_SEED:
            _logger.warning("%s: the seed %r is no whole number and is left out", path, text[:40])
        return None


def as_direction(layer: int, given: object) -> Tensor:
    """A finite floating tensor [d], detached, from a tensor, an array or a list, [d] or [1, d]."""
    tensor = as_vector(f"layer {layer}", given)
    if not torch.isfinite(tensor).all():
        raise ValidationError(
            f"layer {layer} holds NaN or infinite numbers: check the model's dtype and how it was made."
        )
    return tensor.detach()


def as_text_fields(metadata: Mapping[str, str]) -> dict[str, str]:
    """Free metadata, text to text, under names that the file format doesn't use itself."""
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str) or not key:
            raise ValidationError(f"metadata is text to text; got {key!r}: {value!r}.")
        if key in RESERVED_FIELDS:
            raise ValidationError(f"metadata can't use the name {key!r}, which the file format uses itself.")
    return dict(metadata)
