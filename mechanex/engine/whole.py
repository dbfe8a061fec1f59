"""Whole numbers as users have them, told without importing the libraries that they come from."""

from __future__ import annotations

import operator

__all__ = ["as_whole"]


def as_whole(value: object) -> int | None:
    """A whole number of any integer type, NumPy's and 0-d tensors' too, as an int; None for anything else."""
    if isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool"):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None
