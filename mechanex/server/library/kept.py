"""What accounts are told of the vectors and behaviors that they keep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["KeptBehavior", "KeptVector"]


@dataclass(frozen=True)
class KeptBehavior:
    """A named vector, and what watches for the behavior; ``n_examples`` is how many it was made from.

    ``watched`` is what ``Behavior.as_dict`` says; None for one that is a vector alone.
    """

    id: str
    behavior_name: str
    description: str
    steering_vector_id: str
    n_examples: int
    created_at: float
    watched: dict[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        """What there is to say of it."""
        own = {name: value for name, value in vars(self).items() if name != "watched"}
        return {"detector": None, **(self.watched or {}), **own}


@dataclass(frozen=True)
class KeptVector:
    """A vector that an account keeps, and the names of the behaviors that use it."""

    steering_vector_id: str
    behavior_names: tuple[str, ...]
    created_at: float
