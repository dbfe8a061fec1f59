"""What an answer's tokens lose without a chunk of the prompt: many knock-outs as completions of one shared prompt.

*Blocked*: the chunk is read, but what asks and answers can't attend to it. *Removed*: the chunk was never there, and
what stands behind it is read anew, at the positions that it would have. Either is a row's completion with a part of
the row's prompt hidden from it: for a removed chunk all that the shared prompt holds from the chunk on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..attaching import before
from ..capabilities.packing import packing_form
from ..capabilities.unembedding import unembedding_agrees
from ..forward import MASK_BYTES, scored_logprobs
from ..limits import check_length, window_of
from ..models.adapter import Handles, ModelAdapter, exclusive, undisturbed
from ..pack import BATCH_TOKENS, TREES, Mask, Pack, Pair, build_packs
from ..pauses import pause
from ..regimes import first_change
from ..score_pairs import score_pairs

__all__ = ["AnsweredPrompt", "Span", "can_block", "without_attention", "without_chunk", "without_chunk_whole"]

# Tokens of a reading beyond which removed chunks are passes of their own: a plain causal pass skips half of the
# attention, and a row with a mask pays for all of it, whatever it shares.
LONG = 1024

Span = tuple[int, int]
"""First token of a chunk in the prompt, and the one behind its last."""


@dataclass(frozen=True)
class AnsweredPrompt:
    """A prompt with its answer, as token ids.

    Attributes:
        context: ids of the documents and what stands before them; chunks are spans of it.
        question: ids between the documents and the answer, at least one.
        answer: ids of the answer, at least one.
    """

    context: tuple[int, ...]
    question: tuple[int, ...]
    answer: tuple[int, ...]

    @property
    def prompt(self) -> tuple[int, ...]:
        """What stands before the answer."""
        return self.context + self.question

    @property
    def size(self) -> int:
        """Tokens of it all."""
        return len(self.prompt) + len(self.answer)


@dataclass(frozen=True, eq=False)
class _Knockouts(Pack):
    """A pack whose completions don't see all of their prompt.

    Attributes:
        hidden_from, hidden_to: [B, T] int64, positions of the prompt that a completion's token doesn't see; equal for
            none.
        layer: [B, T] int64, the layer at which they are hidden; -1 for all.
    """

    hidden_from: Tensor
    hidden_to: Tensor
    layer: Tensor

    def _hidden(self, mine: slice) -> Tensor:
        place = self.position_ids[:, None, :]
        hidden = self.parent[:, mine, None] == self.segment[:, None, :]
        hidden &= self.hidden_from[:, mine, None] <= place
        hidden &= place < self.hidden_to[:, mine, None]
        return hidden

    def _seen_by(self, first: int, end: int, window: int | None) -> Tensor:
        mine = slice(first, end)
        everywhere = (self.layer[:, mine] < 0)[:, :, None]
        return super()._seen_by(first, end, window) & ~(self._hidden(mine) & everywhere)

    def hidden_at(self, layer: int) -> Tensor:
        """[B, 1, T, T] bool: which token isn't seen by which at this layer alone."""
        here = (self.layer == layer)[:, :, None]
        return (self._hidden(slice(None)) & here)[:, None]


@dataclass(frozen=True)
class _Knockout:
    """One completion: what it is, how much of the prompt is hidden from it and where it stands."""

    pair: Pair
    hidden: Span
    back: int = 0
    layer: int = -1


def can_block(adapter: ModelAdapter, reading: AnsweredPrompt) -> bool:
    """Whether the model takes a mask that hides a chunk from what stands behind it, at this length."""
    if packing_form(adapter, reading.size) not in TREES:
        return False
    return reading.size**2 <= _mask_entries(adapter)


def without_attention(
    adapter: ModelAdapter, reading: AnsweredPrompt, spans: Sequence[Span], layers: Sequence[int] | None = None
) -> Tensor | None:
    """[n, n_answer] log-probabilities of the answer's tokens when question and answer can't attend to a chunk; on the
    CPU.

    Args:
        adapter: the model, one for which :func:`can_block` holds.
        reading: the prompt and its answer.
        spans: what is blocked, one at a time; an empty span blocks nothing.
        layers: for each span the only layer at which it is blocked; None for all layers.

    Returns:
        None where the model's layers aren't given the mask, and so can't be told apart.
    """
    tail = reading.question + reading.answer
    at = [-1] * len(spans) if layers is None else layers
    asked = [
        _Knockout((reading.context, tail), span, layer=layer) for span, layer in zip(spans, at, strict=True)
    ]
    return _run(adapter, reading, asked, layered=layers is not None)


def without_chunk(adapter: ModelAdapter, reading: AnsweredPrompt, spans: Sequence[Span]) -> Tensor:
    """[n, n_answer] log-probabilities of the answer's tokens when a chunk was never there, on the CPU.

    What stands before the chunks is read once for several of them, where the model takes a mask; else each is a pass.

    Args:
        adapter: the model.
        reading: the prompt and its answer.
        spans: what is removed, one at a time.
    """
    if not spans:
        return torch.zeros(0, len(reading.answer))
    if not can_block(adapter, reading) or first_change(adapter.hf_model) is not None:
        return without_chunk_whole(adapter, reading, spans)
    if reading.size > LONG:
        return torch.cat([without_chunk_whole(adapter, reading, [span]) for span in spans])
    budget = _row_budget(adapter, reading)
    order = sorted(range(len(spans)), key=lambda i: spans[i])
    asked: list[_Knockout | None] = [None] * len(spans)
    for group in _groups([spans[i] for i in order], reading.size, budget):
        members = [order[i] for i in group]
        shared = max(1, *(spans[i][0] for i in members))
        for i in members:
            first, end = spans[i]
            rest = reading.context[end:] + reading.question + reading.answer
            asked[i] = _Knockout((reading.context[:shared], rest), (first, shared), shared - first)
    found = _run(adapter, reading, [one for one in asked if one is not None], layered=False)
    assert found is not None
    return found


def without_chunk_whole(adapter: ModelAdapter, reading: AnsweredPrompt, spans: Sequence[Span]) -> Tensor:
    """What :func:`without_chunk` gives, by whole texts."""
    pairs = [
        (reading.context[:first] + reading.context[end:] + reading.question, reading.answer)
        for first, end in spans
    ]
    return torch.stack(score_pairs(adapter, pairs).tokens).cpu()


def _groups(spans: Sequence[Span], size: int, budget: int) -> Iterator[list[int]]:
    """Chunks, in order, that share a row: together with the longest prompt of theirs they fit into the budget."""
    group: list[int] = []
    rests = 0
    for i, (first, end) in enumerate(spans):
        if group and first + rests + size - end > budget:
            yield group
            group, rests = [], 0
        group.append(i)
        rests += size - end
    if group:
        yield group


def _mask_entries(adapter: ModelAdapter) -> int:
    return MASK_BYTES // (2 * adapter.dtype.itemsize)


def _row_budget(adapter: ModelAdapter, reading: AnsweredPrompt) -> int:
    """Tokens of a row of knock-outs: within the window, where the texts are, since models cut masks to it."""
    window = window_of(adapter)
    widest = window if window is not None and reading.size <= window else max(BATCH_TOKENS, 2 * reading.size)
    return min(widest, int(_mask_entries(adapter) ** 0.5))


def _run(
    adapter: ModelAdapter, reading: AnsweredPrompt, asked: Sequence[_Knockout], *, layered: bool
) -> Tensor | None:
    """[n, n_answer] log-probabilities under each knock-out; None where a layer was given no mask to change."""
    check_length(adapter, reading.size)
    adapter.check_token_ids(reading.prompt + reading.answer)
    n = len(reading.answer)
    values: list[Tensor | None] = [None] * len(asked)
    with exclusive(adapter), undisturbed(adapter.hf_model), torch.no_grad():
        packs = _packs(adapter, reading, asked)
        unembedding_agrees(adapter)
        for pack in packs:
            pause()
            with _at_layers(adapter, pack, layered) as reached:
                found = scored_logprobs(adapter, pack).cpu()
            if layered and len(reached) < adapter.n_layers:
                return None
            pair = pack.pair.cpu()
            for i in set(pair.tolist()):
                values[i] = found[pair == i][-n:]
    return torch.stack([v for v in values if v is not None])


def _packs(adapter: ModelAdapter, reading: AnsweredPrompt, asked: Sequence[_Knockout]) -> list[_Knockouts]:
    budget = _row_budget(adapter, reading)
    form = packing_form(adapter, reading.size)
    mask: Mask = form if form in TREES else "plain"
    packs = build_packs(
        [one.pair for one in asked],
        batch_tokens=max(budget, BATCH_TOKENS),
        tree_tokens=lambda shared: max(budget, shared),
        last_tokens=False,
        mask_entries=_mask_entries(adapter),
    )
    return [_knockouts(replace(pack, mask=mask), asked).to(adapter.device) for pack in packs]  # type: ignore[misc]


def _knockouts(pack: Pack, asked: Sequence[_Knockout]) -> _Knockouts:
    table = torch.tensor([[*one.hidden, one.back, one.layer] for one in asked])
    nothing = torch.tensor([0, 0, 0, -1])
    laid = pack.column >= 0
    row, column, pair = pack.row[laid], pack.column[laid], pack.pair[laid]
    of = nothing.repeat(*pack.input_ids.shape, 1)
    of[row, column] = table[pair]
    hidden_from, hidden_to, back, layer = of.unbind(-1)
    held: dict[str, Any] = {f.name: getattr(pack, f.name) for f in fields(pack)}
    for name in ("position_ids", "prompt_length", "text_length"):
        held[name] = held[name] - back
    return _Knockouts(**held, hidden_from=hidden_from, hidden_to=hidden_to, layer=layer)


@contextmanager
def _at_layers(adapter: ModelAdapter, pack: _Knockouts, layered: bool) -> Iterator[set[int]]:
    """Runs a block in which each layer's mask hides what is hidden at it alone; tells which layers were given one."""
    reached: set[int] = set()
    handles = Handles()
    size = pack.input_ids.shape[1]

    def hide(layer: int, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        def masked(value: Any) -> Any:
            if not isinstance(value, Tensor) or value.ndim != 4 or value.shape[-2:] != (size, size):
                return value
            reached.add(layer)
            hidden = pack.hidden_at(layer).to(value.device)
            lowest = False if value.dtype == torch.bool else torch.finfo(value.dtype).min
            return value.masked_fill(hidden, lowest)

        return tuple(masked(value) for value in args), {name: masked(v) for name, v in kwargs.items()}

    try:
        if layered:
            for layer, block in enumerate(adapter.layers):
                handles.add(before(block, partial(hide, layer), kwargs=True))
        yield reached
    finally:
        handles.remove()
