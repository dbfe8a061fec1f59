"""Following a model's calls: the positions of each, from what its decoder layers are given and its cache holds."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..caches import cached_tokens, find_cache
from ..positions import Positions, current_positions, positions_are_given, set_positions
from .facts import contradiction, flat, keeps_a_list, new_tokens, old_tokens, without

__all__ = ["Followed", "Prompts"]

_PARTS = 4  # of a hidden state, enough to tell prompts apart

_ATTACH = "attach it before the prompt's pass"
_STATE = "say where the prompt ends: mechanex.engine.hooks.positions(model, prompt_tokens=…)"


@dataclass
class Prompts:
    """What is known of the prompts of a ``generate`` that runs, or of a loop whose author says where they end.

    Args:
        columns: tokens of the prompts, padding included; None until the first call shows it.
        count: how many prompts there are; None where nothing tells.
        stated: the user's word: calls may read the prompt in pieces.
    """

    columns: int | None
    count: int | None
    stated: bool = False
    shown: Tensor | None = None  # [B, columns, _PARTS] of what entered the first layer in the first call
    grouped: int = 0  # the model's rows in groups of one prompt each, as that call showed

    def note(self, past: int, length: int) -> int:
        """The prompts' columns, which the first call settles."""
        total = past + length
        if self.columns is None or (
            self.shown is None and not self.stated and past and total == past + self.columns
        ):
            self.columns = total
        return self.columns

    def compare(self, hidden: Tensor, columns: int) -> bool:
        """Whether a call that starts anew begins with the prompts that the first call showed."""
        head = hidden[:, :columns, :_PARTS]
        if self.shown is None:
            self.shown = head.detach().clone()
            batch = head.shape[0]
            if self.count and batch % self.count == 0 and _alike(self.shown, self.count):
                self.grouped = batch
        return self.shown.shape == head.shape and bool(torch.equal(self.shown, head))

    def rows(self, batch: int, device: torch.device) -> Tensor | str:
        """[B] the prompt of each of the model's rows, or why that isn't known."""
        rows = torch.arange(batch, device=device)
        if self.stated or self.count == batch:
            return rows
        if self.count is None or batch % self.count:
            known = "an unknown number of" if self.count is None else str(self.count)
            return (
                f"An intervention names rows, which are prompts of the batch, but this generate has {known} prompts "
                f"and calls the model with {batch} rows; steer by tokens, or generate each prompt by itself."
            )
        if batch != self.grouped:
            return (
                f"An intervention names rows, which are prompts of the batch, but it can't be told which of the "
                f"model's {batch} rows belong to which of the {self.count} prompts of this generate; steer by tokens, "
                "or generate each prompt by itself."
            )
        return rows // (batch // self.count)


def _alike(shown: Tensor, count: int) -> bool:
    groups = shown.reshape(count, -1, *shown.shape[1:])
    return bool((groups == groups[:, :1]).all())


@dataclass
class _History:
    """What a cache took in: [B, n] which columns are real, and where its prompts end or why that isn't known."""

    real: Tensor
    columns: int | str
    prompts: Prompts | None


@dataclass
class _Call:
    """A call of the decoder stack that runs: what it was given, its cache and the cached tokens before it."""

    outer: Positions | None
    around: list[Any]
    cache: Any
    past: int | None
    tokens: list[Tensor] = field(default_factory=list)  # what its input embedding was given
    read: bool = False


class Followed(threading.local):
    """Follows the calls of one model, each thread's on its own, so that edits know the position of every token.

    :meth:`begin` and :meth:`end` go around every call of the decoder stack, :meth:`enter` before its first layer.
    """

    def __init__(self) -> None:
        self._calls: list[_Call] = []
        self._histories: WeakKeyDictionary[Any, _History] = WeakKeyDictionary()
        self._prompts: Prompts | None = None

    @contextmanager
    def generating(self, prompts: Prompts) -> Iterator[None]:
        """Runs a block whose calls continue these prompts; in one that runs already, its prompts stay."""
        outer = self._prompts
        self._prompts = prompts if outer is None else outer
        try:
            yield
        finally:
            self._prompts = outer

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Notes a call of the decoder stack."""
        around = flat(args, kwargs.values())
        cache = find_cache(around)
        past = None if cache is None else cached_tokens(cache)
        self._calls.append(_Call(current_positions(), around, cache, past))
        if not positions_are_given():
            set_positions(None)

    def embed(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Notes a call of the input embedding."""
        if self._calls:
            self._calls[-1].tokens += [v for v in flat(args, kwargs.values()) if isinstance(v, Tensor)]

    def enter(self, hidden: Tensor, values: Sequence[Any]) -> None:
        """Works out the positions of the call that runs from what its first layer is given.

        Args:
            hidden: [B, T, d_model] entering the layer.
            values: the layer's other arguments.
        """
        if positions_are_given() or not self._calls or self._calls[-1].read:
            return
        call, found = self._calls[-1], flat(values)
        cache = find_cache(found)
        if cache is not None and cache is not call.cache:
            call.cache, call.past = cache, cached_tokens(cache)
        call.read = True
        set_positions(self.derive(hidden, found, call.around, call.cache, call.past, call.tokens))

    def end(self) -> None:
        """Notes that the call ended, also by an exception."""
        if self._calls:
            set_positions(self._calls.pop().outer)

    def remove(self) -> None:
        """Forgets calls that an interrupt kept from ending (torch runs no hooks then)."""
        while self._calls:
            self.end()

    def derive(
        self,
        hidden: Tensor,
        values: Sequence[Any],
        around: Sequence[Any],
        cache: Any,
        past: int | None,
        tokens: Sequence[Tensor] = (),
    ) -> Positions:
        """The positions of a call.

        Args:
            hidden: [B, T, d_model] entering the first layer.
            values: that layer's other arguments.
            around: arguments of the whole decoder stack.
            cache: the cache of the call, or None.
            past: tokens that it holds, padding included; None where it doesn't tell.
            tokens: token ids among the arguments.
        """
        if hidden.ndim != 3:
            return _unknown(
                hidden, f"its layers are given states of shape {list(hidden.shape)}, not [B, T, d]"
            )
        batch, length, _ = hidden.shape
        history = None if cache is None else _get(self._histories, cache)
        counted = cache is None or past is not None
        if cache is None:
            past = 0
        elif past is None and history is not None:
            past = history.real.shape[1]
        before = self._before(hidden, values, around, history, past)
        if isinstance(before, str):
            return _unknown(hidden, before)
        past = before.shape[1]
        new = None
        if not past or length > 1:
            new = new_tokens(values, batch, length, past)
        real = before.new_ones(batch, length) if new is None else new.to(before.device)
        if cache is None and keeps_a_list(values):
            return _unknown(
                hidden, "its layers keep states in a list, which doesn't tell of the tokens before"
            )
        # Which integers around the stack are positions is told by what its embedding took.
        stack = without(around, tokens) if tokens else ()
        why = contradiction(without(values, tokens), stack, before, real, counted=counted)
        if why is not None:
            return _unknown(hidden, why)
        index = (before.sum(1, keepdim=True) + real.cumsum(1) - 1).masked_fill(~real, -1)
        whole = torch.cat([before, real], 1)
        columns = self._columns(hidden, past, history if past else None)
        lengths = columns if isinstance(columns, str) else _lengths(whole, columns)
        if cache is not None:
            _put(self._histories, cache, _History(whole, columns, self._prompts))
        prompts = (
            torch.arange(batch, device=hidden.device)
            if self._prompts is None
            else self._prompts.rows(batch, hidden.device)
        )
        return Positions(index, lengths if isinstance(lengths, str) else lengths[:, None], prompts)

    def _before(
        self,
        hidden: Tensor,
        values: Sequence[Any],
        around: Sequence[Any],
        history: _History | None,
        past: int | None,
    ) -> Tensor | str:
        """[B, past] bool: which cached tokens are real, or why that isn't known."""
        batch, length, _ = hidden.shape
        if past == 0:
            return torch.ones(batch, 0, dtype=torch.bool, device=hidden.device)
        told = old_tokens([*around, *values], batch, length, past)
        if told is not None:
            return told.to(hidden.device)
        if past is None:
            return f"its cache doesn't tell how many tokens it holds, and steering began after it was filled; {_ATTACH}"
        if history is not None and history.real.shape[0] == batch and history.real.shape[1] >= past:
            return history.real[:, :past]  # fewer than there were: some were taken back
        if history is not None and history.real.shape[0] != batch:
            return f"its cache was filled with {history.real.shape[0]} rows and is used with {batch}"
        shown = [
            m
            for m in [*around, *values]
            if isinstance(m, Tensor) and m.ndim == 4 and m.shape[-1] >= past + length
        ]
        old = [new_tokens([m[..., -1:, :]], batch, past, 0) for m in shown]
        if all(o is None or bool(o.all()) for o in old):
            return torch.ones(batch, past, dtype=torch.bool, device=hidden.device)
        return f"its cache was filled before steering began, and no mask tells its padding; {_ATTACH}"

    def _columns(self, hidden: Tensor, past: int, history: _History | None) -> int | str:
        """Columns of the prompts, padding included, or why that isn't known."""
        prompts, length = self._prompts, hidden.shape[1]
        if prompts is None:
            if not past:
                return length
            if history is None:
                return _end("steering began after the prompt was already in the cache", _ATTACH)
            if length == 1 or isinstance(history.columns, str):
                return history.columns
            return _end(f"{length} more tokens came after the first call with this cache", _STATE)
        if past and history is not None and history.prompts is prompts and not prompts.stated:
            return history.columns
        columns = prompts.note(past, length)
        total = past + length
        if prompts.stated:
            return columns
        if total < columns:
            return _end(
                f"generate gave this call {length} of the prompt's {columns} tokens",
                f"leave prefill_chunk_size and guidance out, or {_STATE}",
            )
        if not past and not prompts.compare(hidden, columns):
            return _end(
                "generate called the model with something else than the prompts it was given",
                f"leave guidance and other searches out, or {_STATE}",
            )
        return columns


def _lengths(real: Tensor, columns: int) -> Tensor:
    """[B] lengths of the prompts, by the rows as they are now: a cache may have been given others since.

    Args:
        real: [B, n] bool, columns so far that are no padding; those that are yet to come are real.
        columns: where the prompts end.
    """
    return real[:, :columns].sum(1) + max(0, columns - real.shape[1])


def _unknown(hidden: Tensor, why: str) -> Positions:
    text = (
        f"Token positions of this call of the model, {list(hidden.shape[:2])} tokens, are not known: {why}."
    )
    return Positions(text, text, text, shape=(hidden.shape[0], hidden.shape[1]))


def _end(why: str, remedy: str) -> str:
    return (
        f"A negative token position counts from the end of the prompt, but {why}; {remedy}, or use positions counted "
        "from the start."
    )


def _get(histories: WeakKeyDictionary[Any, _History], cache: Any) -> _History | None:
    try:
        return histories.get(cache)
    except TypeError:  # can't be hashed or referred to weakly
        return None


def _put(histories: WeakKeyDictionary[Any, _History], cache: Any, history: _History) -> None:
    try:
        histories[cache] = history
    except TypeError:
        return
