"""What was seen in a text while it was written, token by token, and pictures of it; knows no model."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ...errors import ValidationError
from .html import block, legend, shaded, write_page
from .plots import COLUMNS, HIGH, picture, put_text, text_lines
from .shading import Shade

__all__ = ["TracedToken", "WatchedText", "as_picture", "save_traces"]

_FULL = 1.5  # the score of the strongest colour: past that, tokens are as a rule detected
_NOTES = "framed: detected; underlined: corrected"


@dataclass(frozen=True)
class TracedToken:
    """A token of an answer.

    Args:
        token: its id.
        text: its text behind another token's.
        scores: by behavior; empty for the last token, which the model did not read.
        detected: behaviors that it shows.
        corrected: behaviors that were corrected in it.
    """

    token: int
    text: str
    scores: dict[str, float]
    detected: tuple[str, ...]
    corrected: tuple[str, ...]

    @property
    def shade(self) -> Shade:
        """How pictures show it: by its highest score."""
        notes = [f"{name} {score:.2f}" for name, score in self.scores.items()]
        for what, names in (("detected", self.detected), ("corrected", self.corrected)):
            notes += [f"{what}: {', '.join(names)}"] if names else []
        high = max(self.scores.values(), default=0.0)
        return Shade(self.text, high / _FULL, bool(self.detected), bool(self.corrected), "; ".join(notes))


@dataclass(frozen=True)
class WatchedText:
    """A text and what was seen while it was written; in a notebook it shows itself.

    Args:
        text: the prompt and its continuation.
        finish_reason: ``"stop"``, ``"length"``, or ``"behavior"`` where one ended it.
        detected: the behaviors that showed.
        trace: the tokens of the answer.
        prompt: the prompt.
    """

    text: str
    finish_reason: str
    detected: tuple[str, ...]
    trace: tuple[TracedToken, ...]
    prompt: str = ""

    @property
    def summary(self) -> str:
        """How it ended, and what showed."""
        return f"{self.finish_reason}; detected: {', '.join(self.detected) or 'nothing'}"

    def _repr_html_(self) -> str:
        return _html([self])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a picture of it: ``.html`` or ``.png``; errors as ``save_traces``."""
        save_traces([self], path)


def save_traces(texts: list[WatchedText], path: str | os.PathLike[str]) -> None:
    """Writes a picture of texts, tokens coloured by their highest score.

    Args:
        texts: at least one.
        path: an ``.html`` or a ``.png`` file.

    Raises:
        ValidationError: another suffix, or a PNG without matplotlib.
    """
    target = as_picture(path)
    if target.suffix.lower() == ".html":
        write_page(target, "What was watched", _html(texts))
        return
    lines = [
        line
        for one in texts
        for line in (
            *text_lines([Shade(one.prompt), *(token.shade for token in one.trace)]),
            *text_lines([Shade(f"  {one.summary}")]),
            [],
        )
    ]
    scale = [Shade("score "), *(Shade(f" {score:g} ", score / _FULL) for score in (0, 0.5, 1, _FULL))]
    lines += text_lines([*scale, Shade(f"   {_NOTES}")])
    with picture(target, 0.4 + COLUMNS * 0.0753, 0.4 + len(lines) * HIGH) as figure:
        put_text(figure, lines, 0.2, 0.1)


def as_picture(path: str | os.PathLike[str]) -> Path:
    """A path of a picture; a ValidationError for another suffix than ``.html`` and ``.png``."""
    target = Path(path)
    if target.suffix.lower() not in (".html", ".png"):
        raise ValidationError(f"a picture is an .html or a .png file; got {str(path)!r}.")
    return target


def _html(texts: list[WatchedText]) -> str:
    parts = []
    for one in texts:
        parts += [shaded([token.shade for token in one.trace], one.prompt), _said(one.summary)]
    scale = [(score / _FULL, f"{score:g}") for score in (0, 0.5, 1, _FULL)]
    return block([*parts, legend(scale, f"score; {_NOTES}")])


def _said(text: str) -> str:
    return legend([], text)
