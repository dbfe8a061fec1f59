"""Datapoints in JSONL files."""

from __future__ import annotations

import json
import os
from dataclasses import fields
from typing import Any

from ..datasets import prompt_of, read_lines
from ..positions import check_tokens
from .datapoints import TrainingDatapoint

__all__ = ["read_datapoints"]

_KEYS = {field.name for field in fields(TrainingDatapoint)}


def read_datapoints(path: str | os.PathLike[str], *, split: str | None = None) -> list[TrainingDatapoint]:
    """Reads lines whose keys are the fields of a :class:`TrainingDatapoint`; ``token`` is an int or ``[start, stop]``.

    With ``"continue_final_message": true`` the completions go on with the last message of a chat prompt.

    Args:
        path: the file, UTF-8; blank lines are skipped. Other keys are errors: a misspelt one would
            leave a datapoint without completions.
        split: keep only the lines whose ``"split"`` is this; None keeps all.

    Raises:
        NotFoundError: there is no such file.
        ValidationError: a bad line, with its number and what was wrong (of several, the first few), or no
            lines.
    """
    return read_lines(path, _datapoint, split)


def _datapoint(line: dict[str, Any]) -> TrainingDatapoint:
    unknown = sorted(set(line) - _KEYS - {"split", "continue_final_message"})
    if unknown:
        known = ", ".join(sorted(_KEYS))
        raise ValueError(f"it has the unknown key {unknown[0]!r}; known are {known} and split")
    found = {**line, "prompt": prompt_of(line)}
    for key in ("split", "continue_final_message"):
        found.pop(key, None)
    for side in ("src_completions", "dst_completions"):
        texts = found[side] = found.get(side) or []
        if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
            shown = json.dumps(texts)[:40]
            raise ValueError(f"{side!r} is {shown}, and a list of texts is expected, none of them empty")
    if not found["src_completions"] and not found["dst_completions"]:
        raise ValueError("it has neither 'src_completions' nor 'dst_completions'")
    token = found.get("token")
    if isinstance(token, list):
        if len(token) != 2:
            raise ValueError(f"'token' is {json.dumps(token)[:40]}, and an int or [start, stop] is expected")
        found["token"] = slice(*token)
    check_tokens(found.get("token"))
    if not isinstance(found.get("is_negative", False), bool):
        shown = json.dumps(found["is_negative"])[:40]
        raise ValueError(f"'is_negative' is {shown}, and true or false is expected")
    return TrainingDatapoint(**found)
