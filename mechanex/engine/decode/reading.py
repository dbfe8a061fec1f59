"""Prompts on their way into the batch: laid out left-padded, and read in one or more passes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..left_padding import left_padded
from ..positions import Positions
from .calls import Carried, StepInputs
from .evidence import Evidence
from .prefixes import Prefixes
from .row import Row
from .steering import Span

__all__ = ["Numbers", "Reading"]


class Reading:
    """Rows whose prompts are read together.

    Rows with the same prompt and the same edits share one reading: ``prompts`` has the first row of each, and
    ``places`` says for every row where its prompt is among them.

    Args:
        rows: at least one.
        padding: a token id to fill rows with; it is never looked at.
        device: the model's.
        prefixes: texts that were read before, or None.
    """

    def __init__(
        self, rows: Sequence[Row], padding: int, device: torch.device, prefixes: Prefixes | None = None
    ) -> None:
        self.rows = list(rows)
        found: dict[object, int] = {}
        self.places = [found.setdefault(row.prompt_key, len(found)) for row in rows]
        self.prompts = [rows[self.places.index(i)] for i in range(len(found))]
        known = [row.known for row in self.prompts]
        self.columns = max(map(len, known))
        self._padding = [self.columns - len(tokens) for tokens in known]
        ids, index = left_padded(known, padding)
        self._ids, self._index = ids.to(device), index.to(device)
        self._mask, self._positions = (self._index >= 0).long(), self._index.clamp(min=0)
        self._numbers = Numbers(self.prompts, device)
        self._text_lengths = torch.tensor([[len(tokens)] for tokens in known], device=device)
        self.wants_logprobs = self.prompts[0].wants_prompt_logprobs
        self.sound = True
        """Whether the log-probabilities of the prompt are numbers."""
        self.done = 0
        self.kept: Carried | None = None
        self.logits: Tensor | None = None
        self._prefixes = prefixes
        self.evidence = Evidence(self.prompts)
        """What conditions are decided by, where some are yet to be."""
        # A condition looks at the whole of a prompt.
        if not self.evidence.wanted:
            self._begin_behind()

    def decide(self) -> bool:
        """Decides the conditions of prompts that were read to the end; whether they have to be read again, steered."""
        if not self.evidence.wanted:
            return False
        again = False
        for row, place in zip(self.rows, self.places, strict=True):
            again |= row.decide(self.evidence.met(place))
        self.evidence = Evidence(())
        if again:
            self.done, self.kept, self.logits = 0, None, None
            for row in self.rows:
                row.prompt_logprobs = []
            self._begin_behind()
        return again

    def _begin_behind(self) -> None:
        """Starts behind what was read before of every prompt."""
        prefixes = self._prefixes
        if prefixes is None or self.wants_logprobs:
            return
        found = [prefixes.find(row) for row in self.prompts]
        ends = [p + (0 if one is None else one[1]) for p, one in zip(self._padding, found, strict=True)]
        begin = min(ends)
        if begin < 1:
            return
        used = [max(begin - padding, 0) for padding in self._padding]
        taken = [None if one is None else (one[0], n) for one, n in zip(found, used, strict=True)]
        if any(one is not None and 0 < one[1] < one[0].least for one in taken):
            return  # a neighbour that shares less lets this one begin where its kept text can't be gone on from
        self.kept, self.done = prefixes.cache(taken, begin), begin
        for row, place in zip(self.rows, self.places, strict=True):
            if not row.chosen:
                row.cached_tokens = used[place]

    def spans(self) -> list[Span]:
        """Where the prompts' next tokens stand."""
        return [
            Span(row.steering, len(row.ids), self.done - padding, row.request.onlooker)
            for row, padding in zip(self.prompts, self._padding, strict=True)
        ]

    def places_until(self, end: int) -> Tensor:
        """[prompts, columns] int64 positions of the tokens from ``done`` to this column, -1 for padding."""
        return self._index[:, self.done : end]

    def inputs(self, end: int) -> StepInputs:
        """The call that reads on to this column."""
        columns = slice(self.done, end)
        return StepInputs(
            self._ids[:, columns],
            self._mask[:, :end],
            self._positions[:, columns],
            self._numbers.stated(self._index[:, columns]),
            self._text_lengths,
        )


class Numbers:
    """What selectors of tokens and rows ask of rows besides positions.

    Args:
        rows: the rows of a call.
        device: the model's.
    """

    def __init__(self, rows: Sequence[Row], device: torch.device) -> None:
        self._lengths = torch.tensor([[len(row.ids)] for row in rows], device=device)
        named = [row.prompt for row in rows if row.prompt is not None]
        self._prompts = (
            torch.tensor([i for i, _ in named], device=device) if len(named) == len(rows) else None
        )
        self._n_prompts = max((n for _, n in named), default=0)

    def stated(self, index: Tensor) -> Positions:
        """The positions [rows, columns] of a call, -1 for padding, as selectors see them."""
        if self._prompts is None:
            return Positions(index, self._lengths)
        return Positions(index, self._lengths, self._prompts, n_prompts=self._n_prompts)
