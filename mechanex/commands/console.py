"""Printing what models wrote: to terminals of any kind, without letting the text steer the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

__all__ = ["console", "model_text"]


def console() -> Console:
    """A console on stdout; 100 columns where there is no terminal to ask (``COLUMNS`` counts everywhere)."""
    found = Console(highlight=False)
    if not found.is_terminal and "COLUMNS" not in found._environ:
        found.width = 100
    return found


def model_text(text: str, style: str = "") -> Text:
    """A model's text as it is, with control characters shown as U+FFFD and no markup in it."""
    shown = "".join(char if char.isprintable() or char in "\n\t" else "\ufffd" for char in text)
    return Text(shown, style=style)
