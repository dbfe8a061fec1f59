"""Whole numbers as users have them, told without importing the libraries that they come from."""

from __future__ import annotations

import operator

from ..errors import ValidationError

__all__ = ["as_whole", "draw_seed"]


def as_whole(value: object) -> int | None:
    """A whole number of any integer type, NumPy's and 0-d tensors' too, as an int; None for anything else."""
    if isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool"):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def draw_seed(seed: object) -> int | None:
    """The seed of random draws as an int; None for None.

    Raises:
        ValidationError: it is no whole number from 0 to 2**63 - 1.
    """
    if seed is None:
        return None
    whole = as_whole(seed)
    if whole is None or not 0 <= whole < 2**63:
        raise ValidationError(f"seed is a whole number from 0 to 2**63 - 1; got {seed!r:.200}.")
    return whole
