"""How the next token is chosen: the sampling methods, and a sampler with random numbers of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import MechanexError, ValidationError

__all__ = ["METHODS", "Draw", "Sampling"]

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
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, int) or self.top_k < 1:
            raise ValidationError(f"top_k is a number of tokens, at least 1; got {self.top_k!r}.")
        for name in ("top_p", "min_p", "typical_p"):
            share = getattr(self, name)
            if not _is_number(share) or not 0 < share <= 1:
                raise ValidationError(f"{name} is above 0 and at most 1; got {share!r}.")
        if not _is_number(self.temperature) or not 1e-6 <= self.temperature < math.inf:
            raise ValidationError(
                f"temperature is a finite number of 1e-6 or more; got {self.temperature!r}. "
                "For the likeliest token each time, use sampling_method='greedy'."
            )

    def warpers(self) -> list[Any]:
        """What changes the logits [B, V] before drawing, in order."""
        from transformers.generation import logits_process as hf

        found: list[Any] = []
        if self.temperature != 1.0:
            found.append(hf.TemperatureLogitsWarper(float(self.temperature)))
        if self.sampling_method == "top-k":
            found.append(hf.TopKLogitsWarper(self.top_k))
        elif self.sampling_method == "top-p" and self.top_p < 1:
            found.append(hf.TopPLogitsWarper(float(self.top_p)))
        elif self.sampling_method == "min-p":
            found.append(hf.MinPLogitsWarper(float(self.min_p)))
        elif self.sampling_method == "typical" and self.typical_p < 1:
            found.append(hf.TypicalLogitsWarper(float(self.typical_p)))
        return found


class Draw:
    """A logits processor that draws each row's token, so that ``generate`` only takes the likeliest one.

    Each row has a random generator of its own: torch's global one is left alone, and a row's draws depend
    neither on the other rows nor on what other threads draw.

    Args:
        sampling: the method.
        seeds: one per row of the batch.
    """

    def __init__(self, sampling: Sampling, seeds: Sequence[int]) -> None:
        self._greedy = sampling.sampling_method == "greedy"
        self._warpers = [] if self._greedy else sampling.warpers()
        self._seeds = seeds
        self._generators: list[torch.Generator] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """[B, V] logits with -inf at every token but the drawn one; unchanged for greedy."""
        if bool(scores.isnan().any()):
            raise MechanexError(
                "the model's logits are NaN: the steering is too strong for the model's dtype, or the "
                "weights are damaged; try a smaller strength, bfloat16 or float32."
            )
        if self._greedy:
            return scores
        for warper in self._warpers:
            scores = warper(input_ids, scores)
        if not self._generators:
            self._generators = [torch.Generator(scores.device).manual_seed(seed) for seed in self._seeds]
        rows = zip(scores.float().softmax(-1), self._generators, strict=True)
        drawn = torch.stack([torch.multinomial(shares, 1, generator=own) for shares, own in rows])
        return torch.full_like(scores, -math.inf).scatter_(1, drawn, 0.0)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
