"""Where each token of a model call stands in its sequence: absolute positions, prompts, and what selects tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from ..errors import ValidationError
from .whole import as_whole

__all__ = [
    "Positions",
    "TokenSelector",
    "check_tokens",
    "current_positions",
    "followed",
    "given_positions",
    "positions_are_given",
    "selected",
    "selects",
    "set_positions",
    "token_mask",
    "whole_pass",
]

TokenSelector = int | slice | None

_OWN_BATCHES = (
    "An intervention names rows of a batch, but here the engine lays out its own batches; "
    "steer by tokens, or remove the plan around this call."
)


class Positions:
    """Absolute positions of the tokens of one model call, and the prompts that they continue.

    Args:
        index: [B, T] int64 position counted from the sequence's first real token, -1 for padding.
        prompt_lengths: int64 tokens of the prompt that each token belongs to, of a shape that broadcasts to [B, T].
        prompts: [B] int64, the prompt of the batch that each row continues.
        shape: (B, T), where ``index`` is not known.
        n_prompts: how many prompts the batch has, where not all of them need be among the rows.

    What isn't known is a text that says why and what to do; asking for it raises that as a ValidationError.
    """

    def __init__(
        self,
        index: Tensor | str,
        prompt_lengths: Tensor | str,
        prompts: Tensor | str = _OWN_BATCHES,
        *,
        shape: tuple[int, int] | None = None,
        n_prompts: int | None = None,
    ) -> None:
        self.n_prompts = n_prompts
        self._index, self._prompt_lengths, self._prompts = index, prompt_lengths, prompts
        if shape is None:
            assert isinstance(index, Tensor)
            shape = (index.shape[0], index.shape[1])
        self.shape = shape

    @property
    def index(self) -> Tensor:
        """[B, T] int64: the position counted from the row's first real token; -1 for padding."""
        return _known(self._index)

    @property
    def prompt_lengths(self) -> Tensor:
        """Int64, broadcasts to [B, T]: length of each token's prompt."""
        return _known(self._prompt_lengths)

    @property
    def prompts(self) -> Tensor:
        """[B] int64: the prompt of the batch that each row continues."""
        return _known(self._prompts)


def _known(value: Tensor | str) -> Tensor:
    if isinstance(value, str):
        raise ValidationError(value)
    return value


_current: ContextVar[Positions | None] = ContextVar("mechanex_positions", default=None)
_given: ContextVar[bool] = ContextVar("mechanex_given_positions", default=False)


def current_positions() -> Positions | None:
    """The positions of the model call that is running, if something follows its model or they were given."""
    return _current.get()


def set_positions(positions: Positions | None) -> None:
    """Makes these the positions of the call that is running in this thread."""
    _current.set(positions)


def positions_are_given() -> bool:
    """Whether the call that is running is the engine's own, whose positions it states itself."""
    return _given.get()


@contextmanager
def given_positions(positions: Positions) -> Iterator[None]:
    """Runs a block in which these are the positions of the model's calls, whatever their arguments say."""
    given, current = _given.set(True), _current.set(positions)
    try:
        yield
    finally:
        _given.reset(given)
        _current.reset(current)


def check_tokens(tokens: object) -> TokenSelector:
    """What selects tokens, in Python's own ints.

    Raises:
        ValidationError: neither None, a whole number, nor a slice of those with a step of 1 or more.
    """
    if tokens is None:
        return None
    if (number := as_whole(tokens)) is not None:
        return number
    if not isinstance(tokens, slice):
        raise ValidationError(f"token must be an int, a slice or None; got {tokens!r}.")
    given = (tokens.start, tokens.stop, tokens.step)
    parts = [as_whole(one) for one in given]
    if any(part is None and one is not None for part, one in zip(parts, given, strict=True)):
        raise ValidationError(f"A token slice is made of ints; got {tokens!r}.")
    if parts[2] is not None and parts[2] < 1:
        raise ValidationError(f"A token slice needs a step of 1 or more; got {tokens.step}.")
    return slice(*parts)


def token_mask(token: int | slice, positions: Positions) -> Tensor:
    """[B, T] bool: the tokens that ``token`` selects by absolute position.

    Negatives count from the end of the prompt; an open stop has no end; padding is never selected.
    """
    chosen: Tensor = selects(token, positions.index, lambda: positions.prompt_lengths)
    return chosen


def followed(batch: int, length: int) -> Positions:
    """The positions of the running call.

    Raises:
        ValidationError: nothing follows the model's calls, or the layer was given another shape than the model.
    """
    seen = current_positions()
    if seen is None:
        raise ValidationError(
            "These edits name token positions or rows, but nothing follows the model's calls here; attach them with "
            "hf_hooks_contextmanager or a SteeringPlan, or run inside mechanex.engine.hooks.positions(model)."
        )
    if seen.shape != (batch, length):
        raise ValidationError(
            f"The layer was given [{batch}, {length}] tokens, but the model {list(seen.shape)}."
        )
    return seen


def selected(tokens: int | slice, batch: int, length: int) -> Tensor:
    """[B, T] bool: the tokens of the running call at these absolute positions.

    Raises:
        ValidationError: nothing follows the model's calls, or where the tokens stand is not known.
    """
    return token_mask(tokens, followed(batch, length))


def selects(token: TokenSelector, index: Any, prompt_length: Callable[[], Any]) -> Any:
    """Whether ``token`` selects each of the absolute positions ``index``; as :func:`token_mask`.

    Args:
        token: an int, a slice, or None for all.
        index: positions, -1 for padding: an int, or an array or tensor of them, of whose kind the result is.
        prompt_length: gives the prompts' lengths, likewise; called where a negative asks for them.
    """

    if token is None:
        return index >= 0

    def absolute(place: int) -> Any:
        return place if place >= 0 else prompt_length() + place

    if not isinstance(token, slice):
        return (index == absolute(token)) & (index >= 0)
    start = absolute(token.start or 0)
    start = start * (start > 0)
    chosen = (index >= 0) & (index >= start)
    if token.stop is not None:
        chosen = chosen & (index < absolute(token.stop))
    step = token.step or 1
    return chosen if step == 1 else chosen & ((index - start) % step == 0)


def whole_pass(inputs: Tensor) -> Positions:
    """Positions of a pass over whole, unpadded sequences ``inputs`` [B, T, …] without a cache."""
    batch, length = inputs.shape[:2]
    index = torch.arange(length, device=inputs.device).expand(batch, length)
    return Positions(index, index.new_full((batch, 1), length), torch.arange(batch, device=inputs.device))
