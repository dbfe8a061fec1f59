"""Projections of activations on directions, a piece at a time, so that files larger than memory are read once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy
import torch
from torch import Tensor

from ..errors import ValidationError
from .activation_files import StoredRows

__all__ = ["projections"]

_ROWS = 1 << 16  # read at once


def projections(directions: Mapping[int, Tensor], activations: Mapping[int, Any]) -> dict[int, Any]:
    """``{layer: x·v̂}`` [n] for activations [n, d] of each layer that both have; [n, T] for [n, T, d].

    Returns:
        float64 for activations in it, else float32.

    Raises:
        ValidationError: no layer in common, another width, something else than numbers, or a zero direction.
    """
    if not isinstance(activations, Mapping):
        raise ValidationError(
            f"activations are {{layer: [n, d_model]}}; got {type(activations).__name__}: name the layer, as in "
            f"project({{{next(iter(directions))}: …}})."
        )
    shared = [layer for layer in directions if layer in activations]
    if not shared:
        raise ValidationError(
            f"no layer in common: the vector has {list(directions)}, the activations {list(activations)}."
        )
    return {layer: _projected(layer, directions[layer], activations[layer]) for layer in shared}


def _projected(layer: int, direction: Tensor, given: Any) -> Any:
    v = direction.detach().cpu().double().numpy()
    norm = numpy.linalg.norm(v)
    if norm == 0:
        raise ValidationError(f"the vector is zero at layer {layer}: nothing has a projection on it.")
    rows = _as_array(layer, given)
    if rows.shape[-1] != len(v):
        raise ValidationError(
            f"the vector is {len(v)} wide, and the activations of layer {layer} have shape {list(rows.shape)}."
        )
    found = numpy.empty(rows.shape[:-1], rows.dtype if rows.dtype == numpy.float64 else numpy.float32)
    at_once = max(1, _ROWS * rows.shape[-1] // max(1, rows[:1].size))
    for start in range(0, len(rows), at_once):
        found[start : start + at_once] = rows[start : start + at_once] @ (v / norm)
    return found


def _as_array(layer: int, given: Any) -> Any:
    """Numbers [n, …, d]; arrays in files stay there."""
    if isinstance(given, StoredRows):
        return given
    if isinstance(given, Tensor):
        kept = given.detach().cpu()
        rows: Any = (kept if kept.dtype == torch.float64 else kept.float()).numpy()
    else:
        try:
            rows = numpy.asanyarray(given)
        except (TypeError, ValueError):  # such as lists of different lengths
            rows = numpy.empty(())
    if rows.ndim == 0 or rows.dtype.kind not in "fiu":
        raise ValidationError(
            f"the activations of layer {layer} are no numbers [n, d_model]: give an array, a tensor, or lists of one "
            "length."
        )
    return numpy.atleast_2d(rows)
