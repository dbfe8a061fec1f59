"""Printing what models wrote: to terminals of any kind, without letting the text steer the terminal."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.text import Text

__all__ = ["console", "exp", "json_text", "model_text"]


def console(*, stderr: bool = False) -> Console:
    """A console on stdout or stderr; 100 columns where there is no terminal to ask (``COLUMNS`` counts everywhere)."""
    found = Console(highlight=False, stderr=stderr)
    if not found.is_terminal and "COLUMNS" not in found._environ:
        found.width = 100
    return found


def model_text(text: str, style: str = "") -> Text:
    """A model's text as it is, with control characters shown as U+FFFD and no markup in it."""
    shown = "".join(char if char.isprintable() or char in "\n\t" else "\ufffd" for char in text)
    return Text(shown, style=style)


def exp(x: float) -> float:
    """e to the x; infinite where a float can't hold it."""
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf


def json_text(found: Any) -> str:
    """What ``--json`` prints: JSON has no NaN and no infinity, so that these are null."""
    return json.dumps(_finite(found), ensure_ascii=False, indent=2, allow_nan=False)


def _finite(found: Any) -> Any:
    if isinstance(found, float):
        return found if math.isfinite(found) else None
    if isinstance(found, Mapping):
        return {name: _finite(value) for name, value in found.items()}
    if isinstance(found, (list, tuple)):
        return [_finite(value) for value in found]
    return found
