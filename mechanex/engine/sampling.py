"""How the next token is chosen: the sampling methods and their settings."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from typing import Any

from ..errors import ValidationError
from .whole import as_whole

__all__ = ["METHODS", "Sampling"]

METHODS = ("greedy", "top-k", "top-p", "min-p", "typical")


@dataclass(frozen=True)
class Sampling:
    """A sampling method and its settings; each method reads its own, and all but greedy the temperature.

    Args:
        sampling_method: ``greedy``, ``top-k``, ``top-p`` (arXiv:1904.09751), ``min-p`` (arXiv:2407.01082) or
            ``typical`` (arXiv:2202.00666).
        top_k: how many of the likeliest tokens stay.
        top_p: total probability of the likeliest tokens that stay, in (0, 1].
        min_p: least probability of a token that stays, as a share of the likeliest one's, in (0, 1].
        typical_p: total probability of the most typical tokens that stay, in (0, 1].
        temperature: divides the logits, above 0.

    Raises:
        ValidationError: an unknown method or a setting out of its range.
    """

    sampling_method: str = "top-k"
    top_k: int = 50
    top_p: float = 0.9
    min_p: float = 0.05
    typical_p: float = 0.95
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.sampling_method not in METHODS:
            raise ValidationError(
                f"sampling_method is one of {', '.join(METHODS)}; got {self.sampling_method!r}."
            )
        top_k = as_whole(self.top_k)
        if top_k is None or top_k < 1:
            raise ValidationError(f"top_k is a number of tokens, at least 1; got {self.top_k!r}.")
        object.__setattr__(self, "top_k", top_k)
        for name in ("top_p", "min_p", "typical_p"):
            share = getattr(self, name)
            if not _is_number(share) or not 0 < share <= 1:
                raise ValidationError(f"{name} is above 0 and at most 1; got {share!r}.")
        if not _is_number(self.temperature) or not 1e-6 <= self.temperature < math.inf:
            raise ValidationError(
                f"temperature is a finite number of 1e-6 or more; got {self.temperature!r}. "
                "For the likeliest token each time, use sampling_method='greedy'."
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
