"""Where each token of a model call stands in its sequence: absolute positions, seen before the call, not at a layer."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ValidationError

__all__ = [
    "PackPositions",
    "PositionTracker",
    "Positions",
    "TokenSelector",
    "check_tokens",
    "current_positions",
    "pack_positions",
    "read_call",
    "running_pack",
    "selects",
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
        attention_mask: [B, past + T] with 0 for padding (longer where the cache has a fixed size), a 4-D mask, or None.
        position_ids: [B or 1, T], used where there is no 2-D mask.
        past: number of cached positions before this call, padding included; None when unknown.
        tracker: who remembers the prompt's lengths between calls.
        cached: whether the call has a cache, be it empty.
    """

    def __init__(
        self,
        inputs: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        past: int | None,
        tracker: PositionTracker,
        cached: bool = False,
    ) -> None:
        self.cached = cached
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
        real = self._real_tokens()
        if real is not None:
            index = (real.cumsum(1) - 1).masked_fill(~real, -1)
            missing = self.past + length - real.shape[1]
            if missing <= 0:
                return index[:, self.past : self.past + length]
            return torch.where(index >= 0, index + missing, index)[:, -length:]
        if isinstance(self._ids, Tensor) and self._ids.shape[-1] == length:
            return self._ids.reshape(-1, length).to(device).expand(batch, length)
        index = torch.arange(self.past, self.past + length, device=device).expand(batch, length)
        return index - self.tracker.padding(self) if self.past else index

    def _real_tokens(self) -> Tensor | None:
        """[B, past + T or more] bool: which columns hold tokens; None where the call's mask doesn't tell."""
        mask, (batch, length) = self._mask, self.shape
        if not isinstance(mask, Tensor) or mask.shape[0] != batch or mask.shape[-1] < length:
            return None
        if mask.ndim == 2:
            return (mask != 0).to(self._inputs.device)
        if mask.ndim == 4 and self._ids is None and mask.shape[-2] == length:
            # The last token sees every token before it, and no padding.
            last = mask[:, 0, -1].to(self._inputs.device)
            return last if last.dtype == torch.bool else last == 0
        return None

    @cached_property
    def prompt_lengths(self) -> Tensor:
        """[B, 1] or [B, T] int64: length of each token's prompt, which the first pass without a cache was given."""
        return self.tracker.prompt_lengths(self)[:, None]

    def continues(self, last: Positions) -> bool:
        """Whether this call repeats the last one's tokens and one more, as decoding without a cache does."""
        old, new = last._inputs, self._inputs
        return (
            not self.cached
            and old.dtype == new.dtype
            and old.shape[0] == new.shape[0]
            and old.shape[1] + 1 == new.shape[1]
            and bool(torch.equal(old, new[:, :-1]))
        )


class PackPositions(Positions):
    """Positions of a pack's tokens: each on the path of its own prompt and completion.

    Args:
        index: [B, T] int64 place on the path, -1 for padding.
        prompt_lengths: [B, T] or [B, 1] int64 tokens of the prompt that each token belongs to.
        prompts: [B] int64, the prompt of the caller's batch that each row continues; None where there is no such batch.
    """

    def __init__(self, index: Tensor, prompt_lengths: Tensor, prompts: Tensor | None = None) -> None:
        super().__init__(index, None, None, 0, PositionTracker())
        self.index = index
        self.prompt_lengths = prompt_lengths
        self.prompts = prompts


_pack: ContextVar[PackPositions | None] = ContextVar("mechanex_pack", default=None)


def running_pack() -> PackPositions | None:
    """The positions of the call that is running, if it is the engine's own."""
    return _pack.get()


@contextmanager
def pack_positions(positions: PackPositions) -> Iterator[None]:
    """Runs a block in which these are the positions of the model's calls, whatever their arguments say."""
    pack, current = _pack.set(positions), _current.set(positions)
    try:
        yield
    finally:
        _pack.reset(pack)
        _current.reset(current)


def check_tokens(tokens: object) -> None:
    """Raises a ValidationError unless this selects tokens: None, an int, or a slice with a step of 1 or more."""
    if tokens is None or (isinstance(tokens, int) and not isinstance(tokens, bool)):
        return
    if not isinstance(tokens, slice):
        raise ValidationError(f"token must be an int, a slice or None; got {tokens!r}.")
    for part in (tokens.start, tokens.stop, tokens.step):
        if part is not None and (isinstance(part, bool) or not isinstance(part, int)):
            raise ValidationError(f"A token slice is made of ints; got {tokens!r}.")
    if tokens.step is not None and tokens.step < 1:
        raise ValidationError(f"A token slice needs a step of 1 or more; got {tokens.step}.")


def token_mask(token: int | slice, positions: Positions) -> Tensor:
    """[B, T] bool: the tokens that ``token`` selects by absolute position.

    Negatives count from the end of the prompt; an open stop has no end; padding is never selected.
    """
    chosen: Tensor = selects(token, positions.index, lambda: positions.prompt_lengths)
    return chosen


def selects(token: int | slice, index: Any, prompt_length: Callable[[], Any]) -> Any:
    """Whether ``token`` selects each of the absolute positions ``index``; as :func:`token_mask`.

    Args:
        token: an int or a slice.
        index: positions, -1 for padding: an int, or an array or tensor of them, of whose kind the result is.
        prompt_length: gives the prompts' lengths, likewise; called where a negative asks for them.
    """

    def absolute(place: int) -> Any:
        return place if place >= 0 else prompt_length() + place

    if isinstance(token, int):
        return (index == absolute(token)) & (index >= 0)
    start = absolute(token.start or 0)
    start = start * (start > 0)
    chosen = (index >= 0) & (index >= start)
    if token.stop is not None:
        chosen = chosen & (index < absolute(token.stop))
    step = token.step or 1
    return chosen if step == 1 else chosen & ((index - start) % step == 0)


class PositionTracker(threading.local):
    """Follows the calls of one model so that edits know the absolute position of every token; each thread's on its own.

    Register :meth:`before` and :meth:`after` around the model's forward (adapters' ``track_positions``).
    """

    def __init__(self) -> None:
        self._first: Positions | None = None
        self._last: Positions | None = None
        self._lengths: Tensor | None = None
        self._outer: list[Positions | None] = []
        self.seen: int | None = None  # tokens since the last pass without a cache

    def before(self, positions: Positions | None) -> None:
        """Notes a call that begins."""
        self._outer.append(_current.get())
        packed = _pack.get()
        _current.set(positions if packed is None else packed)
        if positions is None or packed is not None:
            return
        if positions.past is not None:
            self.seen = positions.past + positions.shape[1]
        if positions.past == 0 and positions is not self._last:
            if self._first is None or self._last is None or not positions.continues(self._last):
                self._first, self._lengths = positions, None
            self._last = positions

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
            self._lengths = self._first.index.max(1).values + 1
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
    cached = call.get("past_key_values") is not None or call.get("cache_params") is not None
    return Positions(inputs, mask, ids, past, tracker, cached)


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
