"""The methods that compute steering vectors from contrastive examples, by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import ValidationError

if TYPE_CHECKING:
    from torch import nn

    from .models.adapter import ModelAdapter
    from .text import Prompt
    from .vectors import SteeringVector

__all__ = ["check_method", "recorded_vectors", "vectors_by"]

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


def recorded_vectors(
    model: nn.Module | ModelAdapter,
    lists: tuple[Sequence[Prompt], Sequence[str], Sequence[str]],
    layers: Sequence[int] | None,
    method: str,
    tokenizer: Any = None,
    *,
    name: str | None = None,
    split: str | None = None,
    **options: Any,
) -> SteeringVector:
    """Vectors by this method, with a record of where they come from.

    Args:
        model: a Hugging Face or TransformerLens model or its adapter.
        lists: prompts, positive answers and negative ones.
        layers: as the method takes them.
        method: one of those there are.
        tokenizer: needed for text when the model carries none.
        name, split: of the file or set that the lists come from.
        options: further arguments of the method.
    """
    from .models import adapter_for
    from .provenance import data_fields, origin_fields

    found = vectors_by(method)(model, *lists, layers, tokenizer, **options)
    origin = origin_fields(adapter_for(model).hf_model)
    return found.noted(**data_fields(lists, name=name, split=split), **origin)
