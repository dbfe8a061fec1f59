"""What an answer's tokens lose without a chunk of the prompt.

*Blocked*: the chunk is read, but what asks and answers can't attend to it. *Removed*: the chunk was never there, and
what stands behind it is read anew, at the positions that it would have. Either goes on from keys and values of the
documents that were read once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..attaching import before
from ..capabilities.caches import cache_names
from ..capabilities.continuing import ContinuingForm, continuing_form
from ..capabilities.unembedding import unembedding_agrees
from ..continuing import Continuations, TextStates, continuations, read_on
from ..forward import MASK_BYTES, scored_logprobs
from ..limits import check_length
from ..models.adapter import Handles, ModelAdapter, exclusive, undisturbed
from ..pack import BATCH_TOKENS, TREES, usual_tokens
from ..pauses import pause
from ..regimes import first_change
from ..score_pairs import score_pairs

__all__ = ["AnsweredPrompt", "Knockouts", "Span", "without_chunk"]

# Tokens of a text that are worth keeping for another which begins alike.
LEAST_READ = 256
# Tokens up to which several whole texts are one pass, which then costs less than passes over a part of each.
SHORT = BATCH_TOKENS // 2

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


class Knockouts:
    """One reading's knock-outs; the documents are read once for all of them.

    Args:
        adapter: the model.
        reading: the prompt and its answer.

    Attributes:
        can_block: whether the model takes a mask that hides a chunk from what stands behind it, at this length.

    Raises:
        ValidationError: the reading is longer than the model's context, or has tokens that the model hasn't.
    """

    def __init__(self, adapter: ModelAdapter, reading: AnsweredPrompt) -> None:
        check_length(adapter, reading.size)
        adapter.check_token_ids(reading.prompt + reading.answer)
        self._adapter, self._reading = adapter, reading
        self._states: TextStates | None = None
        with exclusive(adapter):
            self._form: ContinuingForm | None = continuing_form(adapter, reading.size)
        self._tail = len(reading.question) + len(reading.answer) - 1
        entries = self._tail * (len(reading.context) + self._tail)
        self.can_block = self._form in TREES and entries <= self._mask_entries

    @property
    def _mask_entries(self) -> int:
        return MASK_BYTES // (2 * self._adapter.dtype.itemsize)

    def blocked(self, spans: Sequence[Span], layers: Sequence[int] | None = None) -> Tensor | None:
        """[n, n_answer] log-probabilities of the answer's tokens when question and answer can't attend to a chunk; on
        the CPU. Only where ``can_block`` holds.

        Args:
            spans: what is blocked, one at a time; an empty span blocks nothing.
            layers: for each span the only layer at which it is blocked; None for all layers.

        Returns:
            None where the model's layers aren't given the mask, and so can't be told apart.
        """
        adapter, n_read = self._adapter, len(self._reading.context)
        found = []
        with self._running() as name:
            states = self._context(name)
            step = self._rows()
            for start in range(0, len(spans), step):
                pause()
                mine = slice(start, start + step)
                pack = self._pack(spans[mine], None if layers is None else layers[mine])
                with _at_layers(adapter, pack, layers is not None) as reached:
                    going_on: dict[str, Any] = {name: states.first(n_read)}
                    found.append(scored_logprobs(adapter, pack, **going_on).cpu())
                if layers is not None and len(reached) < adapter.n_layers:
                    return None
        return torch.cat(found).reshape(len(spans), -1)

    def removed(self, spans: Sequence[Span]) -> Tensor:
        """[n, n_answer] log-probabilities of the answer's tokens when a chunk was never there, on the CPU.

        What stands before a chunk is not read again, where the model can go on from it.

        Args:
            spans: what is removed, one at a time.
        """
        adapter, reading = self._adapter, self._reading
        if not spans:
            return torch.zeros(0, len(reading.answer))
        changes = first_change(adapter.hf_model) is not None or _counts_from_end(adapter)
        if self._form is None or changes or reading.size <= SHORT:
            return without_chunk(adapter, reading, spans)
        with self._running() as name:
            return torch.stack([self._without(name, span) for span in spans])

    def _without(self, name: str, span: Span) -> Tensor:
        pause()
        adapter, reading = self._adapter, self._reading
        context = reading.context[: span[0]] + reading.context[span[1] :]
        shared = span[0] if span[0] >= LEAST_READ else 0
        states = self._context(name).first(shared) if shared else TextStates(adapter.n_layers)
        self._read(name, states, context[shared:], reading.size - (span[1] - span[0]))
        pack = continuations(len(context), [(reading.question, reading.answer)]).to(adapter.device)
        going_on: dict[str, Any] = {name: states}
        return scored_logprobs(adapter, pack, **going_on).cpu()

    def _read(self, name: str, states: TextStates, ids: Sequence[int], text_length: int) -> None:
        mask = None if self._form == "unmasked" else self._form
        prompt_length = text_length - len(self._reading.answer)
        read_on(
            self._adapter,
            name,
            states,
            ids,
            prompt_length=prompt_length,
            text_length=text_length,
            mask=mask,
        )

    @contextmanager
    def _running(self) -> Iterator[str]:
        """A block in which the model is ours; gives the name of its cache."""
        adapter = self._adapter
        with exclusive(adapter), undisturbed(adapter.hf_model), torch.no_grad():
            unembedding_agrees(adapter)
            (name,) = cache_names(adapter)
            yield name

    def _context(self, name: str) -> TextStates:
        if self._states is None:
            states = TextStates(self._adapter.n_layers)
            self._read(name, states, self._reading.context, self._reading.size)
            self._states = states
        return self._states

    def _rows(self) -> int:
        """Knock-outs that fit into a pass."""
        widest = usual_tokens(self._adapter.device)
        while widest > self._tail and widest * (len(self._reading.context) + widest) > self._mask_entries:
            widest //= 2
        return max(1, widest // self._tail)

    def _pack(self, spans: Sequence[Span], layers: Sequence[int] | None) -> _Knockouts:
        reading = self._reading
        mask: Any = self._form
        tails = [(reading.question, reading.answer)] * len(spans)
        plain = continuations(len(reading.context), tails, spans, mask=mask)
        at = torch.full_like(plain.segment, -1)
        if layers is not None:
            at = torch.tensor(layers)[plain.segment]
        held = {f.name: getattr(plain, f.name) for f in fields(plain)}
        return _Knockouts(**held, layer=at).to(self._adapter.device)  # type: ignore[return-value]


def without_chunk(adapter: ModelAdapter, reading: AnsweredPrompt, spans: Sequence[Span]) -> Tensor:
    """What :meth:`Knockouts.removed` gives, by whole texts.

    Args:
        adapter: the model.
        reading: the prompt and its answer.
        spans: what is removed, one at a time.
    """
    pairs = [
        (reading.context[:first] + reading.context[end:] + reading.question, reading.answer)
        for first, end in spans
    ]
    return torch.stack(score_pairs(adapter, pairs).tokens).cpu()


@dataclass(frozen=True, eq=False)
class _Knockouts(Continuations):
    """Questions and answers behind the documents that were read.

    Attributes:
        layer: [1, T] int64, the layer at which a chunk is hidden; -1 for all.
    """

    layer: Tensor

    def hidden(self, mine: slice) -> Tensor:
        return super().hidden(mine) & (self.layer[:, mine, None] < 0)

    def hidden_at(self, layer: int) -> Tensor:
        """[1, 1, T, read + T] bool: which token isn't seen by which at this layer alone."""
        here = super().hidden(slice(None)) & (self.layer == layer)[:, :, None]
        return nn.functional.pad(here, (0, self.input_ids.shape[1]))[:, None]


def _counts_from_end(adapter: ModelAdapter) -> bool:
    """Whether steering that is applied names tokens from the prompt's end: then no two prompts begin alike."""
    for applied in adapter.kept.applied:
        for one in applied.interventions:
            tokens = one.tokens
            ends = (tokens.start, tokens.stop) if isinstance(tokens, slice) else (tokens,)
            if any(end is not None and end < 0 for end in ends):
                return True
    return False


@contextmanager
def _at_layers(adapter: ModelAdapter, pack: _Knockouts, layered: bool) -> Iterator[set[int]]:
    """Runs a block in which each layer's mask hides what is hidden at it alone; tells which layers were given one."""
    reached: set[int] = set()
    handles = Handles()
    shape = (pack.input_ids.shape[1], pack.n_seen)

    def hide(layer: int, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        def masked(value: Any) -> Any:
            if not isinstance(value, Tensor) or value.ndim != 4 or value.shape[-2:] != shape:
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
