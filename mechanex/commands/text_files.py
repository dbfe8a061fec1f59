"""Files of text that commands read."""

from __future__ import annotations

from pathlib import Path

from ..errors import ValidationError

__all__ = ["lines_in", "text_in"]


def text_in(path: Path) -> str:
    """A file's text, without the mark that some editors begin UTF-8 with.

    Raises:
        ValidationError: something else than UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValidationError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): convert it first."
        ) from None


def lines_in(path: Path) -> dict[int, str]:
    """A file's lines that aren't empty by their numbers from 1; what else separates lines in Unicode is text.

    Raises:
        ValidationError: something else than UTF-8.
    """
    return {number: line for number, line in enumerate(text_in(path).split("\n"), start=1) if line}
