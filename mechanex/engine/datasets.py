"""Examples in JSONL files, one a line: contrastive pairs here, others through :func:`read_lines`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from ..errors import NotFoundError, ValidationError
from .chat import continued
from .text import Prompt

__all__ = ["ContrastivePairs", "prompt_of", "read_lines", "read_pairs"]

_T = TypeVar("_T")

_MOST_PROBLEMS = 5
_ANSWERS = {
    "positive": ("positive_answer", "positive"),
    "negative": ("negative_answer", "negative"),
}


@dataclass(frozen=True)
class ContrastivePairs:
    """Examples in three lists of one length, as ``generate_vectors`` takes them.

    Raises:
        ValidationError: lists of other lengths, or texts where lists are meant.
    """

    prompts: list[Prompt]
    positive_answers: list[str]
    negative_answers: list[str]

    def __post_init__(self) -> None:
        lists = {one.name: getattr(self, one.name) for one in fields(self)}
        for name, given in lists.items():
            if not isinstance(given, Sequence) or isinstance(given, (str, bytes)):
                raise ValidationError(f"{name} is a list; got {given!r:.100}.")
        if len({len(given) for given in lists.values()}) > 1:
            told = ", ".join(f"{len(given)} {name}" for name, given in lists.items())
            raise ValidationError(f"Examples are lists of one length; got {told}.")

    def __len__(self) -> int:
        return len(self.prompts)


def read_pairs(path: str | os.PathLike[str], *, split: str | None = None) -> ContrastivePairs:
    """Reads lines of ``prompt`` with ``positive_answer``, ``negative_answer`` or ``positive``, ``negative``.

    Args:
        path: the file, UTF-8; blank lines are skipped, other keys ignored.
        split: keep only the lines whose ``"split"`` is this; None keeps all.

    Raises:
        NotFoundError: there is no such file.
        ValidationError: a bad line, with its number and what was wrong (of several, the first few), or no
            lines.
    """
    found = read_lines(
        path, lambda line: (prompt_of(line), _answer(line, "positive"), _answer(line, "negative")), split
    )
    prompts, positive, negative = (list(column) for column in zip(*found, strict=True))
    return ContrastivePairs(prompts, positive, negative)


def read_lines(
    path: str | os.PathLike[str], parse: Callable[[dict[str, Any]], _T], split: str | None
) -> list[_T]:
    """What ``parse`` makes of each line of a JSONL file.

    Args:
        path: the file, UTF-8; blank lines are skipped.
        parse: from a line's object to a result; raises a ValueError that says what is wrong with the line.
        split: keep only the lines whose ``"split"`` is this; None keeps all.

    Raises:
        NotFoundError: there is no such file.
        ValidationError: a bad line, with its number and what was wrong (of several, the first few), or no
            lines.
    """
    source = Path(path)
    if not source.exists() or source.is_dir():  # a pipe will do
        raise NotFoundError(f"no dataset at {source}: give the path of a .jsonl file.")
    found: list[_T] = []
    problems: list[str] = []
    splits: set[str] = set()
    for number, raw in enumerate(source.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not raw.strip():
            continue
        try:
            line = _parsed(raw)
            parsed = parse(line)
        except ValueError as error:
            problems.append(f"line {number}: {error}")
            continue
        splits.add(str(line.get("split")))
        if split is None or line.get("split") == split:
            found.append(parsed)
    if problems:
        more = len(problems) - _MOST_PROBLEMS
        shown = "; ".join(problems[:_MOST_PROBLEMS]) + (f"; and {more} more" if more > 0 else "")
        raise ValidationError(f"{source} has bad lines: {shown}")
    if not found:
        wanted = "" if split is None else f" with the split {split!r} (it has {', '.join(sorted(splits))})"
        raise ValidationError(f"{source} has no examples{wanted}.")
    return found


def _parsed(raw: bytes) -> dict[str, Any]:
    try:
        line = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 ({error.reason} at byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON ({error.msg} at column {error.colno})") from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(line, dict):
        raise ValueError(f"it is a {type(line).__name__}, and an object is expected")
    return line


def prompt_of(line: dict[str, Any]) -> Prompt:
    """The line's prompt, a chat whose last message goes on where ``continue_final_message`` is true; a ValueError says
    what is wrong with it."""
    prompt: Prompt | None = line.get("prompt")
    if prompt is None:
        raise ValueError("it has no 'prompt' (for none, give an empty text)")
    if not isinstance(prompt, (str, list)):
        raise ValueError(
            f"'prompt' is a {type(prompt).__name__}, and a text or a list of messages is expected"
        )
    if line.get("continue_final_message"):
        return continued(prompt)
    return prompt


def _answer(line: dict[str, Any], side: str) -> str:
    names = [name for name in _ANSWERS[side] if name in line]
    if len(names) != 1:
        both = " or ".join(repr(name) for name in _ANSWERS[side])
        raise ValueError(f"it has no {both}" if not names else f"it has both {both.replace(' or ', ' and ')}")
    answer = line[names[0]]
    if not isinstance(answer, str) or not answer:
        raise ValueError(
            f"{names[0]!r} is {json.dumps(answer)[:40]}, and a text that isn't empty is expected"
        )
    return answer
