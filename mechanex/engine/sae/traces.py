"""What was seen in a text while it was written, token by token; knows no model."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["TracedToken", "WatchedText"]


@dataclass(frozen=True)
class TracedToken:
    """A token of an answer.

    Args:
        token: its id.
        text: its text, as the tokenizer decodes it alone.
        scores: by behavior; empty for the last token, which the model did not read.
        detected: behaviors that it shows.
        corrected: behaviors that were corrected in it.
    """

    token: int
    text: str
    scores: dict[str, float]
    detected: tuple[str, ...]
    corrected: tuple[str, ...]


@dataclass(frozen=True)
class WatchedText:
    """A text and what was seen while it was written.

    Args:
        text: the prompt and its continuation.
        finish_reason: ``"stop"``, ``"length"``, or ``"behavior"`` where one ended it.
        detected: the behaviors that showed.
        trace: the tokens of the answer.
    """

    text: str
    finish_reason: str
    detected: tuple[str, ...]
    trace: tuple[TracedToken, ...]
