"""Projections of activations on directions, a piece at a time, so that files larger than memory are read once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy
from torch import Tensor

from ..errors import ValidationError

__all__ = ["projections"]

_ROWS = 1 << 16  # read at once


def projections(directions: Mapping[int, Tensor], activations: Mapping[int, Any]) -> dict[int, Any]:
    """``{layer: x·v̂}`` [n] for activations [n, d] of each layer that both have.

    Raises:
        ValidationError: no layer in common, another width, or a zero direction.
    """
    shared = [layer for layer in directions if layer in activations]
    if not shared:
        raise ValidationError(
            f"no layer in common: the vector has {list(directions)}, the activations {list(activations)}."
        )
    return {layer: _projected(layer, directions[layer], activations[layer]) for layer in shared}


def _projected(layer: int, direction: Tensor, rows: Any) -> Any:
    v = direction.detach().cpu().double().numpy()
    norm = numpy.linalg.norm(v)
    if norm == 0:
        raise ValidationError(f"the vector is zero at layer {layer}: nothing has a projection on it.")
    if numpy.shape(rows)[-1:] != v.shape:
        raise ValidationError(
            f"the vector is {v.shape[0]} wide, and the activations of layer {layer} have shape {numpy.shape(rows)}."
        )
    if isinstance(rows, Tensor):
        rows = rows.detach().cpu().float().numpy()
    if numpy.ndim(rows) != 2:
        rows = numpy.atleast_2d(rows)
    found = numpy.empty(len(rows), rows.dtype if rows.dtype == numpy.float64 else numpy.float32)
    for start in range(0, len(rows), _ROWS):
        found[start : start + _ROWS] = rows[start : start + _ROWS] @ (v / norm)
    return found
