"""Printing what models wrote: to terminals of any kind, without letting the text steer the terminal."""

from __future__ import annotations

import codecs
import json
import math
import sys
from collections.abc import Callable, Mapping
from typing import Any

import click
from rich.console import Console
from rich.text import Text

__all__ = ["console", "echo_json", "exp", "json_text", "model_text"]


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
    """A JSON document: NaN and infinity, which JSON hasn't, are null; what could steer a terminal is escaped."""
    return _escaped(
        json.dumps(_finite(found), ensure_ascii=False, indent=2, allow_nan=False), str.isprintable
    )


def echo_json(found: Any) -> None:
    """What ``--json`` prints: ``json_text`` on stdout, in UTF-8 where that is its encoding, else in ASCII."""
    text = json_text(found)
    try:
        utf8 = codecs.lookup(sys.stdout.encoding).name == "utf-8"
    except (LookupError, TypeError):
        utf8 = False
    click.echo(text if utf8 else _escaped(text, str.isascii))


def _escaped(text: str, keeps: Callable[[str], bool]) -> str:
    """JSON with every character that isn't kept as ``\\uXXXX``, in two halves beyond U+FFFF; lines stay lines."""
    return "".join(char if char == "\n" or keeps(char) else json.dumps(char)[1:-1] for char in text)


def _finite(found: Any) -> Any:
    if isinstance(found, float):
        return found if math.isfinite(found) else None
    if isinstance(found, Mapping):
        return {name: _finite(value) for name, value in found.items()}
    if isinstance(found, (list, tuple)):
        return [_finite(value) for value in found]
    return found
