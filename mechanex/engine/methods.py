"""The methods that compute steering vectors from contrastive examples, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ..errors import ValidationError

if TYPE_CHECKING:
    from .vectors import SteeringVector

__all__ = ["check_method", "vectors_by"]

_METHODS = ("few-shot", "caa", "pca", "probe")


def check_method(method: str) -> None:
    """Raises a ValidationError for a method that there is none of."""
    if method not in _METHODS:
        raise ValidationError(f"method is one of {', '.join(map(repr, _METHODS))}; got {method!r}.")


def vectors_by(method: str) -> Callable[..., SteeringVector]:
    """The function that computes vectors by this method; takes the model and the examples."""
    if method == "few-shot":
        from .few_shot import few_shot_vectors

        return few_shot_vectors
    if method == "caa":
        from .caa import caa_vectors

        return caa_vectors
    from . import directions

    return directions.pca_vectors if method == "pca" else directions.probe_vectors
