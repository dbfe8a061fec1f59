"""Tokens as pictures show them: how strongly shaded, how marked, and their text made safe to show."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass

__all__ = ["Shade", "color", "visible"]

_FULL = (
    0xE6,
    0x9F,
    0x00,
)  # orange of Okabe and Ito's palette: dark text stays readable on every mixture with white


@dataclass(frozen=True)
class Shade:
    """A token of a picture.

    Args:
        text: its text.
        level: 0 (not shaded) … 1.
        strong: whether it is bold and framed.
        under: whether it is underlined.
        note: what there is to say of it, for a tooltip.
    """

    text: str
    level: float = 0.0
    strong: bool = False
    under: bool = False
    note: str = ""


def color(level: float) -> str:
    """The colour of a level as ``#rrggbb``: from white to orange."""
    share = min(max(level, 0.0), 1.0) if level == level else 0.0
    return "#" + "".join(f"{round(255 + share * (full - 255)):02x}" for full in _FULL)


def visible(text: str) -> str:
    """A text with line ends as ``⏎`` before them, and what can't be seen or would turn lines around as U+FFFD."""
    return "".join(
        "⏎\n" if char == "\n" else char if char == " " or _can_be_seen(char) else "\ufffd"
        for char in text.replace("\t", " ")
    )


def _can_be_seen(char: str) -> bool:
    return char.isprintable() or unicodedata.category(char) == "Zs"
