"""How strongly to steer where nobody says: by the whole vector; and where somebody says, by that."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TypeAlias

from ..errors import ValidationError

__all__ = ["UNSAID", "Strength", "check_plan_strength", "chosen_strength", "strength_of_each"]

_logger = logging.getLogger(__name__)

Strength: TypeAlias = "float | Sequence[float]"


class _Unsaid(int):
    """The documented default 0, told from a 0 that somebody wrote."""


UNSAID = _Unsaid(0)
"""Equals and prints 0, and means that no strength was given."""


def chosen_strength(steering_strength: Strength, strength: Strength | None, *, steered: bool) -> Strength:
    """The strength that a call means: the one that was given by either name, or else 1 where there is a vector.

    Args:
        steering_strength: a number, or one for each of several vectors; ``UNSAID`` where it was left out.
        strength: the same under its short name; None where it was left out.
        steered: whether there is a vector.

    Raises:
        ValidationError: both names, something else than numbers, or a strength other than 0 without a vector.
    """
    unsaid = isinstance(steering_strength, _Unsaid)
    if strength is not None:
        if not unsaid:
            raise ValidationError(
                f"strength={strength!r} and steering_strength={steering_strength!r} are two names of one argument: "
                "give one of them."
            )
        steering_strength, unsaid = strength, False
    if unsaid:
        return 1.0 if steered else 0.0
    if not steered and steering_strength != 0:
        raise ValidationError(
            f"steering_strength is {steering_strength} and there is no steering_vector: give one (an id, "
            "{layer: tensor}, a SteeringVector or a path), or leave the strength at 0."
        )
    return steering_strength


def strength_of_each(strength: Strength, n_vectors: int) -> list[float]:
    """One strength for each of so many vectors: a number serves all of them.

    Raises:
        ValidationError: a list of another length, or something else than numbers.
    """
    if isinstance(strength, (list, tuple)):
        if len(strength) != n_vectors:
            raise ValidationError(
                f"there are {len(strength)} strengths and {n_vectors} vectors: give one for each, or a single number."
            )
        return list(strength)
    return [strength] * n_vectors  # type: ignore[list-item]


def check_plan_strength(strength: float) -> None:
    """Refuses to multiply a plan, whose edits have strengths of their own; warns about 0, which steers nothing."""
    from .given import as_finite

    number = as_finite(strength)
    if number == 0:
        _logger.warning("a steering plan was given with strength 0: nothing is steered")
    elif number != 1:
        raise ValidationError(
            f"a plan's edits have strengths of their own, so its strength is 1, or 0 for none; got {strength!r}."
        )
