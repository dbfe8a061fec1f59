"""Generation settings: how the next token is chosen, how much is written, and what ends it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..errors import ValidationError
from .answering import AnswerRules
from .given import as_finite
from .seeds import checked_seed, row_seed
from .strengths import Strength
from .whole import as_whole

if TYPE_CHECKING:
    from .hooks import SteeringPlan
    from .vectors import SteeringVector

__all__ = ["METHODS", "Options", "Sampling", "end_tokens", "padding_token"]

_logger = logging.getLogger(__name__)

METHODS = ("greedy", "top-k", "top-p", "min-p", "typical", "combined")


@dataclass(frozen=True)
class Sampling:
    """A sampling method and its settings; each method reads its own, and all but greedy the temperature.

    Args:
        sampling_method: ``greedy``, ``top-k``, ``top-p`` (arXiv:1904.09751), ``min-p`` (arXiv:2407.01082) or
            ``typical`` (arXiv:2202.00666); or ``combined``, min-p, then top-k, then top-p of what is left.
        top_k: how many of the likeliest tokens stay. With ``combined`` 0 keeps all.
        top_p: total probability of the likeliest tokens that stay, in (0, 1].
        min_p: least probability of a token that stays, as a share of the likeliest one's, in (0, 1]. With ``combined``
            0 keeps all.
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
        combined = self.sampling_method == "combined"
        top_k = as_whole(self.top_k)
        if top_k is None or top_k < (0 if combined else 1):
            raise ValidationError(
                f"top_k is a number of tokens, at least 1{', or 0 for all' if combined else ''}; got {self.top_k!r}."
            )
        object.__setattr__(self, "top_k", top_k)
        for name in ("top_p", "min_p", "typical_p"):
            share = as_finite(getattr(self, name))
            if share is None or not (0 < share <= 1 or (share == 0 and combined and name == "min_p")):
                raise ValidationError(f"{name} is above 0 and at most 1; got {getattr(self, name)!r}.")
            object.__setattr__(self, name, share)
        temperature = as_finite(self.temperature)
        if temperature is None or temperature < 1e-6:
            raise ValidationError(
                f"temperature is a finite number of 1e-6 or more; got {self.temperature!r}. "
                "For the likeliest token each time, use sampling_method='greedy'."
            )
        object.__setattr__(self, "temperature", temperature)


@dataclass(frozen=True)
class Options(AnswerRules, Sampling):
    """How to continue a prompt: the sampling settings, what the answer is held to, and what follows.

    Args:
        max_tokens: most tokens to add; fewer, with a logged line, where the model's context ends before.
        seed: of the draws; None takes one from torch's global generator, which ``torch.manual_seed`` sets.
        stop: a text or texts that end the continuation; the first that comes is cut off.
        vector: steers the model during this call: a vector, a plan, or a list of such, in order.
        strength: multiplies the vector, of several each or with a list its own; 0 steers nothing and logs a warning.
        guard: most nats of KL(steered‖plain) of a token's distribution; see ``generation.generate``. None for no bound.
        continue_final_message: go on with a chat's last message instead of answering it.

    Raises:
        ValidationError: an argument out of its range.
    """

    max_tokens: int = 128
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    vector: SteeringVector | SteeringPlan | Sequence[SteeringVector | SteeringPlan] | None = None
    strength: Strength = 1.0
    continue_final_message: bool = False
    guard: float | None = None

    def __post_init__(self) -> None:
        Sampling.__post_init__(self)
        AnswerRules.__post_init__(self)
        most = as_whole(self.max_tokens)
        if most is None or most < 1:
            raise ValidationError(f"max_tokens is a number of tokens, at least 1; got {self.max_tokens!r}.")
        object.__setattr__(self, "max_tokens", most)
        if self.min_tokens > most:
            raise ValidationError(f"min_tokens is at most max_tokens: got {self.min_tokens} and {most}.")
        object.__setattr__(self, "seed", checked_seed(self.seed))
        if self.guard is not None:
            guard = as_finite(self.guard)
            if guard is None or guard < 0:
                raise ValidationError(
                    f"guard is a number of nats, 0 or more, or None for no bound; got {self.guard!r}."
                )
            object.__setattr__(self, "guard", guard)
        if not all(isinstance(text, str) and text for text in self.stops):
            raise ValidationError(
                f"stop is a text or a list of texts, none of them empty; got {self.stop!r}."
            )

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop texts as a tuple."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def seeds(self, n_rows: int) -> list[int]:
        """One seed per row."""
        seed = self.seed
        if seed is None:
            seed = int(torch.randint(2**62, ()))
            _logger.info("seed %d", seed)
        return [row_seed(seed, i) for i in range(n_rows)]


def end_tokens(hf: Any, tokenizer: Any) -> list[int]:
    """Ids of the tokens that end an answer: the model's own, else the tokenizer's."""
    own = getattr(getattr(hf, "generation_config", None), "eos_token_id", None)
    found = own if own is not None else tokenizer.eos_token_id
    if found is None:
        return []
    if isinstance(found, torch.Tensor):
        found = found.tolist()
    return [int(end) for end in (found if isinstance(found, (list, tuple)) else [found])]


def padding_token(tokenizer: Any, ends: Sequence[int]) -> int:
    """A token id to fill rows with: the tokenizer's own, else one that ends an answer; it is never looked at."""
    return next((i for i in (tokenizer.pad_token_id, *ends) if i is not None), 0)
