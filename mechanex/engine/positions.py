"""Where each token of a model call stands in its sequence: absolute positions, seen before the call, not at a layer."""

from __future__ import annotations

import inspect
from contextvars import ContextVar
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ValidationError

__all__ = [
    "PositionTracker",
    "Positions",
    "TokenSelector",
    "current_positions",
    "read_call",
    "token_mask",
    "whole_pass",
]

TokenSelector = int | slice | None

_current: ContextVar[Positions | None] = ContextVar("mechanex_positions", default=None)


def current_positions() -> Positions | None:
    """The positions of the model call that is running, if a tracker is attached to its model."""
    return _current.get()


class Positions:
    """Absolute positions of the tokens of one model call, worked out when first asked for.

    Args:
        inputs: the call's ``input_ids`` [B, T] or ``inputs_embeds`` [B, T, d].
        attention_mask: [B, past + T] with 0 for padding, or None, or a 4-D mask (then unused).
        position_ids: [B or 1, T], used where there is no 2-D mask.
        past: number of cached positions before this call, padding included; None when unknown.
        tracker: who remembers the prompt's lengths between calls.
    """

    def __init__(
        self,
        inputs: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        past: int | None,
        tracker: PositionTracker,
    ) -> None:
        self._inputs, self._mask, self._ids = inputs, attention_mask, position_ids
        self.tracker = tracker
        self.past = past

    @property
    def shape(self) -> tuple[int, int]:
        """(batch, tokens of this call)."""
        return self._inputs.shape[0], self._inputs.shape[1]

    @cached_property
    def index(self) -> Tensor:
        """[B, T] int64: the position counted from the row's first real token; -1 for padding.

        Raises:
            ValidationError: a cache that keeps no length, filled before its calls were followed.
        """
        batch, length = self.shape
        device = self._inputs.device
        if self.past is None:
            raise ValidationError(
                "The model's cache doesn't tell how many tokens it holds, and steering began after it was filled; "
                "attach it before the prompt's pass."
            )
        mask = self._mask
        if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[0] == batch and mask.shape[1] >= length:
            real = (mask != 0).to(device)
            index = (real.cumsum(1) - 1).masked_fill(~real, -1)[:, -length:]
            behind = self.past + length - mask.shape[1]
            return torch.where(index >= 0, index + behind, index) if behind > 0 else index
        if isinstance(self._ids, Tensor) and self._ids.shape[-1] == length:
            return self._ids.reshape(-1, length).to(device).expand(batch, length)
        index = torch.arange(self.past, self.past + length, device=device).expand(batch, length)
        return index - self.tracker.padding(self) if self.past else index

    @cached_property
    def prompt_lengths(self) -> Tensor:
        """[B] int64: length of each row's prompt, which is what the first pass without a cache was given."""
        return self.tracker.prompt_lengths(self)

    def continues(self, other: Positions) -> bool:
        """Whether this call repeats the other's tokens and goes on, as decoding without a cache does."""
        old, new = other._inputs, self._inputs
        return (
            old.dtype == new.dtype
            and old.shape[0] == new.shape[0]
            and old.shape[1] < new.shape[1]
            and bool(torch.equal(old, new[:, : old.shape[1]]))
        )


def token_mask(token: int | slice, positions: Positions) -> Tensor:
    """[B, T] bool: the tokens that ``token`` selects by absolute position.

    Negatives count from the end of the prompt; an open stop has no end; padding is never selected.

    Raises:
        ValidationError: a slice with a step below 1, or a selector that is neither int nor slice.
    """
    index = positions.index
    if isinstance(token, int):
        return (index == _absolute(token, positions)) & (index >= 0)
    if not isinstance(token, slice):
        raise ValidationError(f"token must be an int, a slice or None; got {type(token).__name__}.")
    step = 1 if token.step is None else token.step
    if step < 1:
        raise ValidationError(f"A token slice needs a step of 1 or more; got {step}.")
    chosen = index >= 0
    start: int | Tensor = 0
    if token.start is not None:
        start = _absolute(token.start, positions)
        start = start.clamp(min=0) if isinstance(start, Tensor) else start
        chosen = chosen & (index >= start)
    if token.stop is not None:
        chosen = chosen & (index < _absolute(token.stop, positions))
    return chosen if step == 1 else chosen & ((index - start) % step == 0)


def _absolute(place: int, positions: Positions) -> int | Tensor:
    return place if place >= 0 else positions.prompt_lengths[:, None] + place


class PositionTracker:
    """Follows the calls of one model so that edits know the absolute position of every token.

    Register :meth:`before` and :meth:`after` around the model's forward (adapters' ``on_call``).
    """

    def __init__(self) -> None:
        self._first: Positions | None = None
        self._lengths: Tensor | None = None
        self._outer: list[Positions | None] = []
        self.seen: int | None = None  # tokens since the last pass without a cache

    def before(self, positions: Positions | None) -> None:
        """Notes a call that begins."""
        self._outer.append(_current.get())
        _current.set(positions)
        if positions is None:
            return
        if positions.past is not None:
            self.seen = positions.past + positions.shape[1]
        if positions.past == 0 and (self._first is None or not positions.continues(self._first)):
            self._first, self._lengths = positions, None

    def after(self) -> None:
        """Notes that the call ended, also by an exception."""
        _current.set(self._outer.pop() if self._outer else None)

    def remove(self) -> None:
        """Forgets a call that an interrupt kept from ending (torch runs no hooks then)."""
        running = _current.get()
        if running is not None and running.tracker is self:
            _current.set(None)

    def padding(self, positions: Positions) -> Tensor | int:
        """[B, 1] padding tokens before each row of a sequence whose later calls carry no mask; 0 when unknown."""
        if self._first is None or self._first.shape[0] != positions.shape[0]:
            return 0
        return (self._first.index < 0).sum(1, keepdim=True)

    def prompt_lengths(self, positions: Positions) -> Tensor:
        """[B] prompt lengths for the rows of this call.

        Raises:
            ValidationError: no pass without a cache was seen, or the batch changed since.
        """
        if self._first is None:
            raise ValidationError(
                "A negative token position counts from the end of the prompt, but steering began after the prompt "
                "was already in the cache; attach it before the prompt's pass or use positions counted from the start."
            )
        if self._lengths is None:
            index = self._first.index
            self._lengths = index.max(1).values + 1
        if self._lengths.shape[0] != positions.shape[0]:
            raise ValidationError(
                f"The prompt's pass had {self._lengths.shape[0]} rows and this one has {positions.shape[0]}; "
                "negative token positions need the same rows."
            )
        return self._lengths


def read_call(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], tracker: PositionTracker
) -> Positions | None:
    """The positions of a model call from its arguments; None when it has no token or embedding input."""
    call = (dict(zip(_parameter_names(module), args, strict=False)) | kwargs) if args else kwargs
    inputs = call.get("input_ids")
    inputs = call.get("inputs_embeds") if inputs is None else inputs
    if not isinstance(inputs, Tensor) or inputs.ndim < 2:
        return None
    mask, ids = call.get("attention_mask"), call.get("position_ids")
    past = _past_length(call, inputs.shape[1], tracker)
    return Positions(inputs, mask, ids, past, tracker)


def _parameter_names(module: nn.Module) -> list[str]:
    return [p for p in inspect.signature(module.forward).parameters if p != "self"]


def _past_length(call: dict[str, Any], length: int, tracker: PositionTracker) -> int | None:
    """Cached positions before a call; None when a recurrent cache doesn't tell and earlier calls weren't seen."""
    cache = call.get("past_key_values")
    if cache is None:
        cache = call.get("cache_params")
    if cache is None:
        return 0
    try:
        return int(cache.get_seq_length())
    except (AttributeError, ValueError):  # recurrent states keep no length
        pass
    state = getattr(cache, "has_previous_state", True)
    if not (state() if callable(state) else state):
        return 0
    mask, ids = call.get("attention_mask"), call.get("position_ids")
    if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] > length:
        return mask.shape[1] - length
    return int(ids.min()) if isinstance(ids, Tensor) else tracker.seen


def whole_pass(inputs: Tensor) -> Positions:
    """Positions of a pass over whole, unpadded sequences ``inputs`` [B, T, …] without a cache."""
    tracker = PositionTracker()
    positions = Positions(inputs, None, None, 0, tracker)
    tracker.before(positions)
    tracker.after()
    return positions
