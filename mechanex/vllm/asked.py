"""What a request says of its steering: how it travels through vLLM, and which tokens it edits."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from ..engine.positions import check_tokens, selects
from ..engine.whole import as_whole
from ..errors import ValidationError

__all__ = [
    "FIELD",
    "AskedEdit",
    "Carried",
    "Scope",
    "as_scope",
    "as_text",
    "block_salt",
    "edits_of",
    "in_scope",
]

FIELD = "mechanex"
"""The key of a request's edits among ``SamplingParams.extra_args``; over HTTP, vLLM calls these ``vllm_xargs``."""

Scope = int | slice | Literal["prompt", "generated"] | None
"""Tokens that are edited: an absolute position or a slice of them, negatives counting from the end of the prompt; those
of the prompt, or those after it; None for all."""

_NAMED: dict[str, Scope] = {"all": None, "prompt": "prompt", "generated": "generated"}


@dataclass(frozen=True)
class AskedEdit:
    """One set of edits of a request.

    Args:
        key: hash of the edits' content, under which the workers hold them.
        strength: multiplies them.
        tokens: which tokens they edit.
    """

    key: str
    strength: float
    tokens: Scope = None


@dataclass(frozen=True)
class Carried:
    """What a request's steering becomes.

    Args:
        fields: what the request carries in ``extra_args``; none where nothing is asked for.
        keys: of what it needs from the workers, to be leased for as long as it runs.
        missing: what of it the workers don't hold yet, packed, by its keys.
    """

    fields: Mapping[str, str] = field(default_factory=dict)
    keys: tuple[str, ...] = ()
    missing: Mapping[str, bytes] = field(default_factory=dict)

    def __add__(self, other: Carried) -> Carried:
        """Both together."""
        return Carried(
            {**self.fields, **other.fields},
            tuple({*self.keys, *other.keys}),
            {**self.missing, **other.missing},
        )


def as_scope(tokens: object) -> Scope:
    """``tokens`` if it names tokens; ``"all"`` does so, too.

    Raises:
        ValidationError: it is something else.
    """
    if isinstance(tokens, str):
        if tokens not in _NAMED:
            raise ValidationError(
                f"tokens is 'all', 'prompt', 'generated', an int, a slice or None; got {tokens!r}."
            )
        return _NAMED[tokens]
    check_tokens(tokens)
    return tokens if isinstance(tokens, slice) else as_whole(tokens)


def in_scope(tokens: Scope, index: Any, prompt_length: int) -> Any:
    """Whether the absolute positions ``index`` are edited.

    Args:
        tokens: the scope.
        index: an int or an array of them, 0 and up; the result is of its kind.
        prompt_length: of the request, in tokens.
    """
    if tokens == "prompt":
        return index < prompt_length
    if tokens == "generated":
        return index >= prompt_length
    return selects(tokens, index, lambda: prompt_length)


def as_text(edits: Sequence[AskedEdit]) -> str:
    """Edits as the text that a request carries."""
    return json.dumps([[one.key, one.strength, _scope_out(one.tokens)] for one in edits])


@lru_cache(maxsize=4096)
def edits_of(text: str) -> tuple[AskedEdit, ...]:
    """The edits of a request that carries this text.

    Raises:
        ValidationError: ``as_text`` can't have written it.
    """
    try:
        found = tuple(AskedEdit(str(key), float(s), _scope_in(tokens)) for key, s, tokens in json.loads(text))
    except (TypeError, ValueError) as error:
        raise ValidationError(
            f"a request's extra_args[{FIELD!r}] is written by mechanex.vllm and was changed since: {error}"
        ) from error
    if any(not math.isfinite(one.strength) for one in found):
        raise ValidationError(f"a strength of extra_args[{FIELD!r}] is not finite: {text}")
    return found


def block_salt(edits: Sequence[AskedEdit], start: int, stop: int, prompt_length: int) -> list[str]:
    """What the keys and values of a block of tokens depend on beside the tokens, as parts of its hash.

    Nothing where no token of the block is edited: a block's hash holds those before it. The same for requests that do
    the same to its tokens, however they say it.

    Args:
        edits: the request's, in order.
        start, stop: absolute positions of the block.
        prompt_length: of the request.
    """
    positions = np.arange(start, stop)
    parts = []
    for one in edits:
        chosen = in_scope(one.tokens, positions, prompt_length)
        if chosen.any():
            where = "all" if chosen.all() else np.packbits(chosen).tobytes().hex()
            parts.append(f"{FIELD}:{one.key}:{one.strength!r}:{where}")
    return parts


def _scope_out(tokens: Scope) -> Any:
    return [tokens.start, tokens.stop, tokens.step] if isinstance(tokens, slice) else tokens


def _scope_in(tokens: Any) -> Scope:
    return as_scope(slice(*tokens) if isinstance(tokens, list) else tokens)
