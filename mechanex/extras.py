"""How an optional part of the library is installed, for messages about one that is missing."""

from __future__ import annotations

__all__ = ["install_line"]


def install_line(extra: str) -> str:
    """The command that installs an extra from a clone or from a wheel's file; no package index has this library."""
    return f"pip install '.[{extra}]' in a clone of mechanex, or pip install '<path of its wheel>[{extra}]'"
