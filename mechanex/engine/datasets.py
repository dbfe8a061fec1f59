"""Contrastive examples in JSONL files: one prompt, one positive and one negative answer a line."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import NotFoundError, ValidationError
from .text import Prompt

__all__ = ["ContrastivePairs", "read_pairs"]

_MOST_PROBLEMS = 5
_ANSWERS = {
    "positive": ("positive_answer", "positive"),
    "negative": ("negative_answer", "negative"),
}


@dataclass(frozen=True)
class ContrastivePairs:
    """Examples in three lists of one length, as ``generate_vectors`` takes them."""

    prompts: list[Prompt]
    positive_answers: list[str]
    negative_answers: list[str]

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
    source = Path(path)
    if not source.is_file():
        raise NotFoundError(f"no dataset at {source}: give the path of a .jsonl file.")
    pairs = ContrastivePairs([], [], [])
    problems: list[str] = []
    splits: set[str] = set()
    for number, raw in enumerate(source.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not raw.strip():
            continue
        try:
            line = _parsed(raw)
            prompt, positive, negative = _prompt(line), _answer(line, "positive"), _answer(line, "negative")
        except ValueError as error:
            problems.append(f"line {number}: {error}")
            continue
        splits.add(str(line.get("split")))
        if split is None or line.get("split") == split:
            pairs.prompts.append(prompt)
            pairs.positive_answers.append(positive)
            pairs.negative_answers.append(negative)
    if problems:
        more = len(problems) - _MOST_PROBLEMS
        shown = "; ".join(problems[:_MOST_PROBLEMS]) + (f"; and {more} more" if more > 0 else "")
        raise ValidationError(f"{source} has bad lines: {shown}")
    if not pairs.prompts:
        wanted = "" if split is None else f" with the split {split!r} (it has {', '.join(sorted(splits))})"
        raise ValidationError(f"{source} has no examples{wanted}.")
    return pairs


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


def _prompt(line: dict[str, Any]) -> Prompt:
    prompt: Prompt | None = line.get("prompt")
    if prompt is None:
        raise ValueError("it has no 'prompt' (for none, give an empty text)")
    if not isinstance(prompt, (str, list)):
        raise ValueError(
            f"'prompt' is a {type(prompt).__name__}, and a text or a list of messages is expected"
        )
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
