"""What is attributed: a number for each row of logits at the prompt's end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import ValidationError
from ..joins import continue_ids
from ..models.adapter import ModelAdapter
from ..whole import as_whole

__all__ = ["Answer", "LogprobDifference", "Metric", "check_metric", "first_token", "metric_of", "summed"]

Metric = Callable[[Tensor], Tensor]
"""From logits [B, n_vocab], float32, at the last position, to [B]; gradients flow through it."""

Answer = str | int


@dataclass(frozen=True)
class LogprobDifference:
    """How much more likely one next token is than another, as a difference of natural logarithms.

    Args:
        answer: token id.
        other: token id, or None for the log-probability of the answer alone.
    """

    answer: int
    other: int | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        logprobs = logits.log_softmax(-1)
        found = logprobs[:, self.answer]
        return found if self.other is None else found - logprobs[:, self.other]

    @property
    def name(self) -> str:
        return "logprob" if self.other is None else "logprob_difference"


def metric_of(
    given: Metric | Sequence[Answer] | None, clean: Tensor, corrupted: Tensor, tokens: Callable[[Answer], int]
) -> Metric:
    """The metric that a caller means.

    Args:
        given: a function; two answers (texts, of which the first token counts, or token ids); or None for the two runs'
            top tokens, and where those are the same, for that token alone.
        clean, corrupted: [n_vocab] logits at the end of each prompt.
        tokens: from an answer to its first token's id.

    Raises:
        ValidationError: anything else.
    """
    if given is None:
        top, other = int(clean.argmax()), int(corrupted.argmax())
        return LogprobDifference(top, None if top == other else other)
    if callable(given):
        return given
    if isinstance(given, str) or not isinstance(given, Sequence) or len(given) != 2:
        raise ValidationError(
            "metric is a function of logits [B, n_vocab], or two answers, the clean prompt's first, such as "
            f"(' Paris', ' Rome'); got {given!r}."
        )
    answer, other = map(tokens, given)
    if answer == other:
        raise ValidationError(f"the two answers {given!r} begin with the same token: give others.")
    return LogprobDifference(answer, other)


def first_token(adapter: ModelAdapter, tokenizer: Any, prompt: Sequence[int], answer: Answer) -> int:
    """The id of an answer's first token where it follows a prompt.

    Raises:
        ValidationError: an empty text, no text or token id, or an unknown id.
    """
    if isinstance(answer, str) and tokenizer is not None:
        ids = continue_ids(tokenizer, list(prompt), answer) if answer else []
    else:
        token = as_whole(answer)
        ids = [token] if token is not None and token >= 0 else []
    if not ids:
        raise ValidationError(
            f"an answer is a text with at least one token, or a token id; got {answer!r}"
            + (" and no tokenizer." if isinstance(answer, str) and tokenizer is None else ".")
        )
    adapter.check_token_ids(ids[:1])
    return ids[0]


def check_metric(found: object, rows: int) -> Tensor:
    """What a metric gave for rows of logits.

    Raises:
        ValidationError: it isn't a number for each.
    """
    if isinstance(found, Tensor) and found.shape == (rows,) and torch.is_floating_point(found):
        return found
    got = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
    raise ValidationError(
        f"a metric gives a number for each row, [{rows}], of logits [{rows}, n_vocab]; got {got}."
    )


def summed(metric: Metric, logits: Tensor) -> Tensor:
    """The sum of a metric over rows of logits [B, n_vocab], which gradients flow through.

    Raises:
        ValidationError: they don't, or it isn't a number for each row.
    """
    total = check_metric(metric(logits), logits.shape[0]).sum()
    if not total.requires_grad:
        raise ValidationError(
            "the metric has no gradient: compute it from the logits with torch's operations."
        )
    return total
