"""The batch that decodes: prompts are read and join it, each step gives every row a token, finished rows leave."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..engine.models.adapter import ModelAdapter
from ..errors import MechanexError
from .cache import RollingCache, fresh_cache
from .request import Step, TokenLogprob
from .row import Row
from .row_steering import RowSteering, Span
from .sampler import are_sound, choose, logprobs_of, not_finite

__all__ = ["Batch", "Outcome", "Reading"]

Outcome = tuple[Row, "Step | MechanexError | None"]
"""A row and what came of a step: something to tell, an error that ends it, or nothing yet."""

_LOGITS = 2**25  # most numbers in the logits of one pass over a prompt whose log-probabilities are asked for


class Reading:
    """Prompts on their way into the batch, left-padded to one length and read in one or more passes.

    Rows with the same prompt and the same edits share one reading: ``prompts`` has the first row of each, and
    ``places`` says for every row where its prompt is among them.
    """

    def __init__(self, rows: Sequence[Row], padding: int, device: torch.device, config: Any) -> None:
        self.rows = list(rows)
        found: dict[object, int] = {}
        self.places = [found.setdefault(row.prompt_key, len(found)) for row in rows]
        self.prompts = [rows[self.places.index(i)] for i in range(len(found))]
        known = [row.known for row in self.prompts]
        self.columns = max(map(len, known))
        self.padding = [self.columns - len(tokens) for tokens in known]
        ids = torch.full((len(known), self.columns), padding, dtype=torch.long)
        for i, tokens in enumerate(known):
            ids[i, self.padding[i] :] = torch.tensor(tokens)
        left = torch.tensor(self.padding)[:, None]
        places = torch.arange(self.columns)[None] - left
        self.ids = ids.to(device)
        self.mask = (places >= 0).long().to(device)
        self.positions = places.clamp(min=0).to(device)
        self.cache = fresh_cache(config)
        self.wants_logprobs = self.prompts[0].wants_prompt_logprobs
        self.sound = True
        """Whether the log-probabilities of the prompt are numbers."""
        self.done = 0
        self.logits: Tensor | None = None


class Batch:
    """Rows that are decoded together.

    Args:
        adapter: the model; it has to be in eval mode, without gradients, and nobody else's while a method runs.
        padding: a token id to fill rows with; it is never looked at.
        prefill_tokens: most tokens of one pass over a single long prompt.
    """

    def __init__(self, adapter: ModelAdapter, padding: int, prefill_tokens: int) -> None:
        self.steering = RowSteering(adapter)
        self.rows: list[Row] = []
        self._adapter, self._padding, self._prefill_tokens = adapter, padding, prefill_tokens
        self._model: Any = adapter.hf_model
        self._accepts = frozenset(inspect.signature(self._model.forward).parameters)
        self._cache: RollingCache | None = None
        self._columns = 0
        self._changes = 0

    @property
    def columns(self) -> int:
        """Columns of the cache: the length of the longest row."""
        return self._columns

    def read(self, rows: Sequence[Row]) -> Reading:
        """Prompts to be read together, by ``advance``; one alone, for any number of rows, if it is long or its
        log-probabilities are wanted."""
        return Reading(rows, self._padding, self._adapter.device, self._model.config)

    def advance(self, reading: Reading) -> bool:
        """Makes one pass over the prompts; whether they are read to the end now."""
        begin, end = reading.done, reading.columns
        whole = reading.wants_logprobs
        if len(reading.prompts) == 1:
            most = self._prefill_tokens
            if whole:
                most = max(1, min(most, _LOGITS // max(int(self._adapter.config.vocab_size), 1)))
            end = min(end, begin + most)
        spans = [
            Span(row.request.steering, len(row.ids), begin - padding)
            for row, padding in zip(reading.prompts, reading.padding, strict=True)
        ]
        logits = self._call(
            spans,
            None,
            reading.ids[:, begin:end],
            reading.mask[:, :end],
            reading.positions[:, begin:end],
            reading.cache,
            keep=0 if whole else 1,
        )
        if whole:
            reading.sound &= are_sound(logits[0])
            self._note_prompt(reading.rows, logits[0], begin)
        reading.done, reading.logits = end, logits[:, -1]
        return end == reading.columns

    def join(self, reading: Reading) -> list[Outcome]:
        """Chooses the first token of each prompt that was read; those that go on join the batch."""
        assert reading.logits is not None
        if not reading.sound:
            return [(row, not_finite(row)) for row in reading.rows]
        empty = [i for i, row in enumerate(reading.rows) if row.max_tokens < 1]
        outcomes: list[Outcome] = [(reading.rows[i], reading.rows[i].finish_unread()) for i in empty]
        wanted = [i for i in range(len(reading.rows)) if i not in empty]
        if wanted:
            logits = reading.logits[[reading.places[i] for i in wanted]]
            outcomes += self._choose([reading.rows[i] for i in wanted], logits)
        going = {
            id(row) for row, news in outcomes if row.result is None and not isinstance(news, MechanexError)
        }
        stay = [i for i, row in enumerate(reading.rows) if id(row) in going]
        if stay:
            longest = max(reading.rows[i].length for i in stay)
            if self._cache is None:
                self._cache = RollingCache(reading.cache)
            columns = max(self._columns, longest)
            places = [reading.places[i] for i in stay]
            everyone = places == list(range(len(reading.prompts)))
            self._cache.admit(reading.cache, columns, None if everyone else places, longest)
            self._columns = columns
            self.rows += [reading.rows[i] for i in stay]
            self._changes += 1
        return outcomes

    def step(self) -> list[Outcome]:
        """Gives every row a token; finished ones leave."""
        lengths = [row.length for row in self.rows]
        columns, device = self._columns, self._adapter.device
        places = torch.tensor(lengths)[:, None]
        tokens = torch.tensor([[row.chosen[-1]] for row in self.rows])
        mask = (torch.arange(columns + 1)[None] >= columns - places).long()
        spans = [
            Span(row.request.steering, len(row.ids), length)
            for row, length in zip(self.rows, lengths, strict=True)
        ]
        logits = self._call(
            spans, self._changes, tokens.to(device), mask.to(device), places.to(device), self._cache, keep=1
        )
        self._columns += 1
        outcomes = self._choose(self.rows, logits[:, -1])
        self.drop(
            [row for row, news in outcomes if row.result is not None or isinstance(news, MechanexError)]
        )
        return outcomes

    def drop(self, rows: Sequence[Row]) -> None:
        """Takes rows out of the batch."""
        if not rows:
            return
        leaving = {id(row) for row in rows}
        self._changes += 1
        if all(id(row) in leaving for row in self.rows):
            self.rows, self._cache, self._columns = [], None, 0
            return
        assert self._cache is not None
        for i in reversed(range(len(self.rows))):
            if id(self.rows[i]) in leaving:
                self._cache.drop(i)
                self.rows[i] = self.rows[-1]
                self.rows.pop()
        longest = max(row.length for row in self.rows)
        if longest < self._columns:
            self._cache.trim(longest)
            self._columns = longest

    def _call(
        self,
        spans: list[Span],
        key: object,
        ids: Tensor,
        mask: Tensor,
        positions: Tensor,
        cache: Any,
        *,
        keep: int,
    ) -> Tensor:
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "past_key_values": cache}
        if "position_ids" in self._accepts:
            inputs["position_ids"] = positions
        if keep and "logits_to_keep" in self._accepts:
            inputs["logits_to_keep"] = keep
        self.steering.prepare(spans, ids.shape[1], key)
        try:
            logits: Tensor = self._model(**inputs, use_cache=True, return_dict=True).logits
        finally:
            self.steering.rest()
        return logits

    def _choose(self, rows: Sequence[Row], logits: Tensor) -> list[Outcome]:
        outcomes: list[Outcome] = []
        for row, found in zip(rows, choose(rows, logits), strict=True):
            outcomes.append((row, found if isinstance(found, MechanexError) else row.take(*found)))
        return outcomes

    def _note_prompt(self, rows: Sequence[Row], logits: Tensor, begin: int) -> None:
        """Keeps the log-probabilities of the rows' one prompt that ``logits`` [n, vocabulary] predict."""
        found: list[TokenLogprob | None] = [None] if begin == 0 else []
        following = rows[0].ids[begin + 1 : begin + 1 + logits.shape[0]]
        if following:
            most = [rows[0].request.logprobs or 0] * len(following)
            found += logprobs_of(logits[: len(following)], following, most)
        for row in rows:
            row.prompt_logprobs += found
