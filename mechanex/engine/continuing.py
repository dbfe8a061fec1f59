"""Going on from a text that was read once: its keys and values stand still while many continuations look at them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._private.transformers import Cache, DynamicLayer
from .models.adapter import ModelAdapter
from .pack import Mask, Pack, Pair
from .passes import run_pack

__all__ = ["Continuations", "TextStates", "continuations", "read_on"]

# Tokens that go on from a read text in one call: each pays for a mask over all that stands before the call's end, and
# fewer waste less of it on what they don't see, until the calls are too small. On two CPU cores 256 to 512 are fastest.
PART = 512

Span = tuple[int, int]


class _Read(Exception):
    """Ends a pass that only reads; an Exception, so that torch runs ``always_call`` hooks."""


class _Columns(DynamicLayer):  # type: ignore[no-untyped-call]
    """A layer that keeps all columns, whatever window it has."""

    last = False
    reading = False

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        found = super().update(key_states, value_states, *args, **kwargs)
        if self.last and self.reading:
            raise _Read
        return found


class TextStates(Cache):
    """Keys and values of a text, all columns of every layer; what a layer's window hides, masks hide.

    Args:
        n_layers: of the model.
    """

    def __init__(self, n_layers: int) -> None:
        self._columns = [_Columns() for _ in range(n_layers)]  # type: ignore[no-untyped-call]
        self._columns[-1].last = True
        super().__init__(layers=list(self._columns))

    @property
    def n_tokens(self) -> int:
        """Tokens that were read."""
        return int(self._columns[0].get_seq_length())

    def first(self, n: int) -> TextStates:
        """The first ``n`` tokens' states, as views, to go on from; what is added there isn't added here."""
        found = TextStates(len(self._columns))
        for new, held in zip(found._columns, self._columns, strict=True):
            if n and held.is_initialized:
                assert held.keys is not None and held.values is not None
                new.lazy_initialization(held.keys, held.values)
                new.keys, new.values = held.keys[:, :, :n], held.values[:, :, :n]
        return found

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Runs a block in which a call ends where its last layer would begin to attend."""
        self._columns[-1].reading = True
        try:
            yield
        except _Read:
            pass
        finally:
            self._columns[-1].reading = False


@dataclass(frozen=True, eq=False)
class Continuations(Pack):
    """Texts that go on from one that was read, side by side in one row; none sees another.

    Attributes:
        read: tokens that were read.
        hidden_from, hidden_to: [1, T] int64, those of them that a token doesn't see; equal for none.
    """

    read: int
    hidden_from: Tensor
    hidden_to: Tensor

    @property
    def n_seen(self) -> int:
        return self.read + super().n_seen

    def hidden(self, mine: slice) -> Tensor:
        """[1, q, read] bool: which of the tokens that were read is hidden from which of the row's."""
        place = torch.arange(self.read, device=self.hidden_from.device)
        return (self.hidden_from[:, mine, None] <= place) & (place < self.hidden_to[:, mine, None])

    def _seen_by(self, first: int, end: int, window: int | None) -> Tensor:
        mine = slice(first, end)
        seen = ~self.hidden(mine)
        if window is not None:
            place = torch.arange(self.read, device=self.hidden_from.device)
            seen &= self.position_ids[:, mine, None] < place + window
        return torch.cat([seen, super()._seen_by(first, end, window)], -1)

    def inputs(self, dtype: torch.dtype, window: int | None) -> dict[str, Any]:
        if self.layout == "padded":  # One continuation that sees everything, as any text that goes on.
            return {"input_ids": self.input_ids, "attention_mask": self.input_ids.new_ones(1, self.n_seen)}
        return super().inputs(dtype, window)


def continuations(
    read: int,
    tails: Sequence[Pair],
    hidden: Sequence[Span] | None = None,
    *,
    start: int | None = None,
    prompt_length: int | None = None,
    text_length: int | None = None,
    mask: Mask = "plain",
) -> Continuations:
    """Lays out continuations of a text that was read.

    Args:
        read: its tokens.
        tails: for each what it goes on with, at least one token, and the completion behind that, which is scored.
        hidden: for each the tokens of the text that it doesn't see; None for a single one that sees all.
        start: position of the first token of each; None for the one behind the text.
        prompt_length: tokens of the prompt; None for the text and what the first goes on with.
        text_length: tokens of the whole text; None for what each is with its completion.
        mask: how the model takes its mask.
    """
    start = read if start is None else start
    ids: list[int] = []
    columns: dict[str, list[int]] = {name: [] for name in ("place", "segment", "length", "from", "to")}
    scored: list[tuple[int, int, int, int]] = []
    for i, (before, completion) in enumerate(tails):
        first = len(ids) + len(before) - 1
        written = [*before, *completion[:-1]]
        ends = len(ids) + len(written)
        scored += (
            (first + 1 + k if first + 1 + k < ends else -1, first + k, token, i)
            for k, token in enumerate(completion)
        )
        ids += written
        columns["place"] += range(start, start + len(written))
        away = (0, 0) if hidden is None else hidden[i]
        for name, value in (
            ("segment", i),
            ("length", text_length or start + len(before) + len(completion)),
            ("from", away[0]),
            ("to", away[1]),
        ):
            columns[name] += [value] * len(written)
    by_token = {name: torch.tensor([values]) for name, values in columns.items()}
    column, predictor, target, pair = torch.tensor(scored).T
    row = by_token["segment"]
    return Continuations(
        layout="padded" if hidden is None else "tree",
        input_ids=torch.tensor([ids]),
        position_ids=by_token["place"],
        segment=row,
        parent=torch.full_like(row, -1),
        prompt_length=torch.full_like(
            row, start + len(tails[0][0]) if prompt_length is None else prompt_length
        ),
        text_length=by_token["length"],
        source=torch.zeros_like(row),
        row=torch.zeros_like(pair),
        column=column,
        predictor=predictor,
        target=target,
        pair=pair,
        mask=mask,
        read=read,
        hidden_from=by_token["from"],
        hidden_to=by_token["to"],
    )


def read_on(
    adapter: ModelAdapter,
    name: str,
    states: TextStates,
    ids: Sequence[int],
    *,
    prompt_length: int,
    text_length: int,
    mask: Mask | None = None,
) -> None:
    """Adds the keys and values of further tokens to a text's.

    Args:
        adapter: the model, in eval mode and without gradients.
        name: under which it takes its cache.
        states: what was read before; added to.
        ids: token ids, any number.
        prompt_length: tokens of the prompt that they belong to, from whose end edits may count.
        text_length: tokens of the whole text.
        mask: how the model takes a mask, which is then made once for all layers; None to let the model make its own.
    """
    before = states.n_tokens
    # Without anything before it a call needs no mask, and so no parts.
    part = PART if before else max(1, len(ids))
    for start in range(0, len(ids), part):
        some = [(ids[start : start + part], _UNREAD)]
        pack = continuations(
            before + start,
            some,
            None if mask is None or not before else [(0, 0)],
            prompt_length=prompt_length,
            text_length=text_length,
            mask=mask or "plain",
        )
        with states.reading():
            run_pack(adapter, pack.to(adapter.device), **{name: states})


# Last tokens of completions aren't laid out: nothing is scored behind them.
_UNREAD = (0,)
