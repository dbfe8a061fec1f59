"""What a vector is optimized on: prompts with completions to promote (dst) and to suppress (src)."""

from __future__ import annotations

import json
import os
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from ...errors import ValidationError
from ..datasets import prompt_of, read_lines
from ..given import as_finite
from ..positions import check_tokens
from ..text import Prompt, encode_pair

__all__ = ["Completion", "Side", "TrainingDatapoint", "by_datapoint", "completions_of", "read_datapoints"]

Side = Literal["src", "dst"]


@dataclass
class TrainingDatapoint:
    """A datapoint used for optimizing steering vectors.

    Args:
        prompt: text, token ids or chat messages.
        src_completions: completions that steering shall make unlikely (suppression), texts or token ids.
        dst_completions: completions that steering shall make likely (promotion).
        src_completions_target_losses: a loss for each of ``src_completions`` at which optimization may stop.
        dst_completions_target_losses: the same for ``dst_completions``.
        token: the tokens that are steered, an int or a slice, None for all; absolute positions in prompt and
            completion, negatives count from the end of the prompt.
        is_negative: steer with the negated vector here.
    """

    prompt: Prompt
    src_completions: list[str] = field(default_factory=list)
    dst_completions: list[str] = field(default_factory=list)
    src_completions_target_losses: list[float] | None = None
    dst_completions_target_losses: list[float] | None = None
    token: slice | int | None = None
    is_negative: bool = False

    def completions(self, side: Side) -> Sequence[Any]:
        """The completions of one side; an empty list where there are none."""
        return (self.src_completions if side == "src" else self.dst_completions) or []

    def target_losses(self, side: Side) -> Sequence[float] | None:
        """The target losses of one side's completions, or None."""
        return self.src_completions_target_losses if side == "src" else self.dst_completions_target_losses


@dataclass(frozen=True)
class Completion:
    """One completion of one datapoint, as token ids.

    Attributes:
        datapoint: index of its datapoint.
        side: "src" or "dst".
        place: index among the completions of that side.
        prompt, ids: token ids, neither empty.
        target: its own target loss, or None.
        token, is_negative: of its datapoint.
    """

    datapoint: int
    side: Side
    place: int
    prompt: tuple[int, ...]
    ids: tuple[int, ...]
    target: float | None
    token: slice | int | None
    is_negative: bool

    def __str__(self) -> str:
        return f"{self.side} completion {self.place} of datapoint {self.datapoint}"

    @property
    def steered(self) -> Hashable:
        """What completions of one prompt must share to be run in one tree: how their tokens are edited."""
        return self.is_negative, repr(self.token)

    def check_steered(self, only_prompt: bool) -> bool:
        """Whether any token whose edit can change this completion's loss is selected."""
        return any(True for _ in self._edited(only_prompt))

    def _edited(self, only_prompt: bool) -> Iterator[int]:
        n = len(self.prompt)
        places = range(n if only_prompt else n + len(self.ids) - 1)
        if self.token is not None and not isinstance(self.token, slice):
            place = self.token if self.token >= 0 else n + self.token
            return iter([place] if place in places else [])
        if self.token is None:
            return iter(places)
        start, stop, step = self.token.start, self.token.stop, self.token.step
        first = 0 if start is None else max(start if start >= 0 else n + start, 0)
        end = len(places) if stop is None else min(stop if stop >= 0 else n + stop, len(places))
        return iter(range(first, end, step or 1))


def completions_of(
    datapoints: Sequence[TrainingDatapoint], tokenizer: Any, *, only_prompt: bool = False
) -> list[Completion]:
    """All completions of all datapoints: by datapoint, src before dst.

    Args:
        datapoints: at least one.
        tokenizer: needed for text.
        only_prompt: only tokens of prompts are edited.

    Raises:
        ValidationError: names the datapoint and what is wrong with it.
    """
    if isinstance(datapoints, TrainingDatapoint) or not isinstance(datapoints, Sequence):
        raise ValidationError(
            f"datapoints is a list of TrainingDatapoint; got {type(datapoints).__name__}: write [datapoint]."
        )
    if not datapoints:
        raise ValidationError("There are no datapoints to optimize on; give at least one TrainingDatapoint.")
    found: list[Completion] = []
    for i, datapoint in enumerate(datapoints):
        if not isinstance(datapoint, TrainingDatapoint):
            raise ValidationError(f"Datapoint {i} is a {type(datapoint).__name__}, not a TrainingDatapoint.")
        try:
            found += _encoded(i, datapoint, tokenizer, only_prompt)
        except ValidationError as error:
            raise ValidationError(f"Datapoint {i}: {error.message}") from error
    return found


def _encoded(i: int, datapoint: TrainingDatapoint, tokenizer: Any, only_prompt: bool) -> list[Completion]:
    check_tokens(datapoint.token)
    found: list[Completion] = []
    sides: tuple[Side, ...] = ("src", "dst")
    for side in sides:
        texts, targets = datapoint.completions(side), datapoint.target_losses(side)
        if isinstance(texts, str) or not isinstance(texts, Sequence):
            raise ValidationError(
                f"{side}_completions is a list of completions; got {texts!r}: write [{texts!r}]."
            )
        _check_targets(side, targets, len(texts))
        for place, text in enumerate(texts):
            if not isinstance(text, str | Sequence):
                raise ValidationError(f"{side} completion {place} is text or token ids; got {text!r}.")
            prompt, ids = encode_pair(tokenizer, datapoint.prompt, text)
            target = None if targets is None else float(targets[place])
            found.append(
                Completion(
                    i,
                    side,
                    place,
                    tuple(prompt),
                    tuple(ids),
                    target,
                    datapoint.token,
                    bool(datapoint.is_negative),
                )
            )
    if not found:
        raise ValidationError("it has no completions; give src_completions, dst_completions or both.")
    if not any(c.check_steered(only_prompt) for c in found):
        where = "of its prompt" if only_prompt else "that its completions depend on"
        raise ValidationError(
            f"token={datapoint.token!r} selects no position {where}, so the vector would have no effect; its prompt "
            f"has {len(found[0].prompt)} tokens."
        )
    return found


def _check_targets(side: Side, targets: Any, n: int) -> None:
    if targets is None:
        return
    if isinstance(targets, str) or not isinstance(targets, Sequence) or len(targets) != n:
        raise ValidationError(
            f"{side}_completions_target_losses holds one number for each of the {n} {side}_completions; "
            f"got {targets!r}."
        )
    for target in targets:
        if as_finite(target) is None:
            raise ValidationError(f"{side}_completions_target_losses holds finite numbers; got {target!r}.")


def by_datapoint(completions: Sequence[Completion], values: Sequence[float]) -> list[list[list[float]]]:
    """One value per completion as ``[[src…], [dst…]]`` per datapoint."""
    nested: list[list[list[float]]] = [[[], []] for _ in range(completions[-1].datapoint + 1)]
    for completion, value in zip(completions, values, strict=True):
        nested[completion.datapoint][completion.side == "dst"].append(value)
    return nested


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
    keys = {key.name for key in fields(TrainingDatapoint)}
    unknown = sorted(set(line) - keys - {"split", "continue_final_message"})
    if unknown:
        known = ", ".join(sorted(keys))
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
