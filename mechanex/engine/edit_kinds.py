"""How a vector edits the stream and which tokens of a text, by the names that vectors carry in their metadata."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..errors import ValidationError
from .intervention import Edit
from .positions import TokenSelector

__all__ = ["EDITS", "TOKENS", "check_kind", "check_token_kind", "edit_of"]

EDITS: dict[str, Callable[[Tensor], Edit]] = {
    "add": Edit.add,
    "clamp": lambda direction: Edit.clamp(direction, 1.0),
    "norm": lambda direction: Edit.add(direction).gated("norm"),
}
"""From strength times the vector to the edit. add: it is added; clamp: the projection on it becomes its norm; norm:
it is added and the row gets its own norm back."""

TOKENS: dict[str, TokenSelector] = {"all": None, "generated": slice(-1, None), "prompt": slice(0, -1)}
"""Tokens by name. generated: those that an answer is predicted from, the prompt's last one and the answer's own;
prompt: those before."""


def check_kind(edit: str) -> None:
    """Raises a ValidationError for a kind of edit that there is none of."""
    if edit not in EDITS:
        raise ValidationError(f"an edit is one of {', '.join(map(repr, EDITS))}; got {edit!r}.")


def check_token_kind(tokens: str) -> None:
    """Raises a ValidationError for a name of tokens that there is none of."""
    if tokens not in TOKENS:
        raise ValidationError(
            f"the tokens to steer are one of {', '.join(map(repr, TOKENS))}; got {tokens!r}."
        )


def edit_of(kind: str, direction: Tensor) -> Edit:
    """The edit of a kind by a direction [d_model] that has its strength in it; the zero direction has none but add.

    Raises:
        ValidationError: an unknown kind, or a zero direction that it can't do without.
    """
    check_kind(kind)
    return EDITS[kind](direction)
