"""Seeds of draws: which numbers are seeds, and those of the rows that share one."""

from __future__ import annotations

from ..errors import ValidationError
from .whole import as_whole

__all__ = ["checked_seed", "row_seed"]


def checked_seed(seed: object) -> int | None:
    """A seed as an int, or None for none.

    Raises:
        ValidationError: it isn't a whole number of any integer type from 0 to 2**63 - 1.
    """
    if seed is None:
        return None
    number = as_whole(seed)
    if number is None or not 0 <= number < 2**63:
        raise ValidationError(f"seed is a whole number from 0 to 2**63 - 1; got {seed!r:.200}.")
    return number


def row_seed(seed: int, i: int) -> int:
    """The seed of row ``i`` of those that are drawn from one seed."""
    return (seed + i) % 2**63
