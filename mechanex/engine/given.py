"""What users give, in the forms they have it in, as what the engine computes with."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ValidationError
from ..ops.dtypes import DTYPES

__all__ = ["as_finite", "as_list", "as_mask", "as_number", "as_table", "as_vector"]


def as_number(value: object) -> float | None:
    """A number of any type, NumPy's and a tensor that holds one too, as a float; None for anything else."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def as_finite(value: object) -> float | None:
    """As :func:`as_number`, but None for NaN and infinities too."""
    number = as_number(value)
    return number if number is not None and math.isfinite(number) else None


def as_list(name: str, value: object, kind: str) -> list[Any]:
    """What can be walked through as a list.

    Args:
        name: what it is called in messages.
        value: a list, an array, a generator, …
        kind: what it is a list of.

    Raises:
        ValidationError: something else, a text among it, or nothing in it.
    """
    if isinstance(value, (str, bytes)):
        raise ValidationError(f"{name} is a list of {kind}; got one text: put it in a list.")
    if isinstance(value, Mapping) or not isinstance(value, Iterable) or getattr(value, "ndim", 1) == 0:
        raise ValidationError(f"{name} is a list of {kind}; got {value!r:.100}: put it in a list.")
    if not (found := list(value)):
        raise ValidationError(f"There are no {kind}: {name} is an empty list; give at least one.")
    return found


def as_mask(name: str, value: object) -> Tensor:
    """Truth values [batch, tokens]; a tensor keeps its device.

    Args:
        name: what they are called in messages.
        value: a tensor, NumPy array or nested list of bools.

    Raises:
        ValidationError: something else.
    """
    if isinstance(value, Tensor):
        kind, shape = str(value.dtype), list(value.shape)
        found = value
    else:
        array = _as_array(value)
        kind, shape = str(array.dtype), list(array.shape)
        found = torch.from_numpy(np.array(array)) if array.dtype == np.bool_ else torch.empty(0)
    if found.dtype != torch.bool or found.ndim != 2:
        raise ValidationError(f"{name} is [batch, tokens] of bool; got {shape} of {kind}.")
    return found


def as_table(name: str, value: object) -> Tensor:
    """Numbers of any shape, floating; a floating tensor keeps its device, gradient and, if torch computes in it, dtype.

    Args:
        name: what they are called in messages.
        value: a tensor, NumPy array or nested list of numbers.

    Raises:
        ValidationError: something else.
    """
    found = value if isinstance(value, Tensor) else _from_numbers(name, value)
    return _computable(name, found) if found.is_floating_point() else found.float()


def as_vector(name: str, value: object) -> Tensor:
    """One vector [d] of floating numbers; a tensor keeps its device, gradient and, if torch computes in it, dtype.

    Args:
        name: what it is called in messages.
        value: a tensor, NumPy array or list of numbers; [d], or with leading axes of length 1.

    Raises:
        ValidationError: something else, several vectors, or none.
    """
    found = value if isinstance(value, Tensor) else _from_numbers(name, value)
    while found.ndim > 1 and found.shape[0] == 1:
        found = found[0]
    if found.ndim != 1 or found.numel() == 0 or not found.is_floating_point():
        raise ValidationError(
            f"{name} must be one vector of floating numbers [d]; got {found.dtype} of shape {list(found.shape)}."
        )
    return _computable(name, found)


def _computable(name: str, found: Tensor) -> Tensor:
    """Floating numbers in a dtype that torch computes in: float32 for those of eight bits, which it holds exactly."""
    if found.dtype in DTYPES:
        return found
    try:
        return found.float()
    except (RuntimeError, TypeError) as error:
        raise ValidationError(
            f"{name} is {found.dtype}, which torch doesn't turn into float32 ({error}): convert it yourself."
        ) from error


def _as_array(value: object) -> Any:
    """A NumPy array of what is given; one of objects where that can't be."""
    try:
        return np.asarray(value)
    except (TypeError, ValueError, RuntimeError):
        return np.asarray(None)


def _from_numbers(name: str, value: object) -> Tensor:
    """A NumPy array in its own precision, float32 for lists."""
    array = _as_array(value)
    if array.dtype.kind not in "fiu":
        raise ValidationError(
            f"{name} must be numbers: a tensor, a NumPy array or a list of numbers; got {type(value).__name__}."
        )
    wide = isinstance(value, np.ndarray) and array.dtype.itemsize >= 8 and array.dtype.kind == "f"
    return torch.from_numpy(np.array(array, dtype=np.float64 if wide else np.float32))
