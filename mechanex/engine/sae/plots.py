"""Texts and bars in pictures drawn by matplotlib."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..figures import BLUE, RED, figure_to
from .shading import Shade, color, visible

__all__ = ["picture", "put_bars", "put_text", "text_lines"]

COLUMNS = 96
_WORDS = re.compile(r"\s*\S+|\s+")
_SIZE = 9.0  # points
_WIDE = 0.602 * _SIZE / 72  # inches of a character of DejaVu Sans Mono
HIGH = 1.9 * _SIZE / 72  # inches of a line
_Line = list[tuple[int, Shade]]


def picture(path: Path, width: float, height: float) -> AbstractContextManager[Any]:
    """A figure whose parts stand where they are put; see :func:`mechanex.engine.figures.figure_to`."""
    return figure_to(path, width, height, layout=None, instead="or save as .html")


def text_lines(tokens: Iterable[Shade], columns: int = COLUMNS) -> list[_Line]:
    """Tokens in lines of so many columns; what is longer than a line goes on in the next."""
    lines: list[_Line] = [[]]
    at = 0
    for token in tokens:
        for i, part in enumerate(visible(token.text).split("\n")):
            if i:
                lines.append([])
                at = 0
            for word in _WORDS.findall(part):
                for piece in (word[k : k + columns // 2] for k in range(0, len(word), columns // 2)):
                    wide = _columns(piece)
                    if at and at + wide > columns:
                        lines.append([])
                        at = 0
                    lines[-1].append((at, replace(token, text=piece)))
                    at += wide
    return lines


def put_text(figure: Any, lines: Sequence[_Line], left: float, top: float) -> float:
    """Draws lines of tokens from this place on, in inches from the left and from the top; the place below them."""
    from matplotlib.patches import Rectangle

    width, height = figure.get_size_inches()
    for line in lines:
        top += HIGH
        for at, token in line:
            x, y = left + at * _WIDE, height - top
            wide, tall = _columns(token.text) * _WIDE, HIGH * 0.82
            box = Rectangle(
                (x / width, (y - 0.22 * HIGH) / height),
                wide / width,
                tall / height,
                facecolor=color(token.level),
                edgecolor="#1a1a1a" if token.strong else "none",
                linewidth=1.2 if token.strong else 0,
                transform=figure.transFigure,
            )
            figure.add_artist(box)
            if token.under:
                line_box = Rectangle(
                    (x / width, (y - 0.2 * HIGH) / height),
                    wide / width,
                    0.1 * HIGH / height,
                    facecolor=BLUE,
                    transform=figure.transFigure,
                )
                figure.add_artist(line_box)
            figure.text(
                x / width,
                y / height,
                token.text,
                fontsize=_SIZE,
                family="DejaVu Sans Mono",
                weight="bold" if token.strong else "normal",
                color="#1a1a1a",
                parse_math=False,
            )
    return top


def put_bars(axes: Any, names: Sequence[str], values: Sequence[float], title: str) -> None:
    """Horizontal bars, the first on top: blue to the right, red to the left."""
    places = list(range(len(names)))
    axes.barh(places, values, color=[BLUE if value >= 0 else RED for value in values])
    axes.set_yticks(places)
    axes.set_yticklabels(
        [repr(visible(name))[:24] for name in names],
        fontsize=_SIZE - 2,
        family="DejaVu Sans Mono",
        parse_math=False,
    )
    axes.invert_yaxis()
    axes.axvline(0, color="#1a1a1a", linewidth=0.8)
    axes.set_title(title, fontsize=_SIZE)
    axes.tick_params(axis="x", labelsize=_SIZE - 2)
    axes.spines[["top", "right"]].set_visible(False)


def _columns(text: str) -> int:
    return sum(1 + (unicodedata.east_asian_width(char) in "WF") for char in text)
