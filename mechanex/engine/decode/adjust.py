"""Penalties for what a row has already, biases of single tokens, and ends that come too early, for a whole batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .row import Row

__all__ = ["Adjustments"]


class Adjustments:
    """Follows which tokens the answers have; made anew when rows come or go.

    Args:
        rows: the rows of the batch.
        device: where logits are.
        unread: [rows] tokens that the rows are yet to be given, or None.
    """

    def __init__(self, rows: Sequence[Row], device: torch.device, unread: Tensor | None = None) -> None:
        self._device, self._unread = device, unread
        requests = [row.request for row in rows]
        self._penalized = [i for i, r in enumerate(requests) if r.frequency_penalty or r.presence_penalty]
        self._biased = [i for i, r in enumerate(requests) if r.logit_bias]
        self._given_biases = [requests[i].logit_bias for i in self._biased]
        self._given_counts = [tuple(rows[i].counts.items()) for i in self._penalized]
        self._repeating = [i for i, r in enumerate(requests) if r.repetition_penalty != 1]
        self._given_seen = [
            [(token, 1.0) for token in {*rows[i].ids, *rows[i].chosen}] for i in self._repeating
        ]
        self._seen: Tensor | None = None
        # Tokens that each row still has to be given before it may end, and what would end it.
        ahead = int(unread is not None)
        self._awaited = {
            i: (r.min_tokens - len(rows[i].chosen) - ahead, sorted(rows[i].ends))
            for i, r in enumerate(requests)
            if r.min_tokens > len(rows[i].chosen) + ahead
        }
        self._n_noted = 0
        self._no_ends: tuple[Tensor, Tensor] | None = None
        self._no_ends_until = 0
        self._biases: Tensor | None = None
        self._counts: Tensor | None = None
        if self._penalized:
            column = [requests[i] for i in self._penalized]
            self._frequency = torch.tensor([r.frequency_penalty for r in column], device=device)[:, None]
            self._presence = torch.tensor([r.presence_penalty for r in column], device=device)[:, None]
            self._penalized_at = torch.tensor(self._penalized, device=device)
        if self._repeating:
            self._repeating_at = torch.tensor(self._repeating, device=device)
            penalties = [requests[i].repetition_penalty for i in self._repeating]
            self._repetition = torch.tensor(penalties, device=device)[:, None]
        if self._biased:
            self._biased_at = torch.tensor(self._biased, device=device)

    def __call__(self, logits: Tensor) -> Tensor:
        """The float32 logits [rows, vocabulary] with every row's biases and penalties, out of place."""
        scores = logits
        if self._biased:
            if self._biases is None:
                self._biases = self._dense(self._given_biases, logits.shape[-1])
            scores = scores.index_add(0, self._biased_at, self._biases)
        if self._repeating:
            if self._seen is None:
                self._seen = self._dense(self._given_seen, logits.shape[-1])
                if self._unread is not None:
                    self._note_seen(self._unread)
            part = scores.index_select(0, self._repeating_at)
            penalized = torch.where(part > 0, part / self._repetition, part * self._repetition)
            part = torch.where(self._seen > 0, penalized, part)
            scores = scores.index_copy(0, self._repeating_at, part)
        if self._penalized:
            if self._counts is None:
                self._counts = self._dense(self._given_counts, logits.shape[-1])
                if self._unread is not None:
                    self._note_counts(self._unread)
            taken = self._frequency * self._counts + self._presence * (self._counts > 0)
            scores = scores.index_add(0, self._penalized_at, taken, alpha=-1)
        return self._without_ends(scores)

    def _without_ends(self, scores: Tensor) -> Tensor:
        """The scores with those of end tokens ruled out where a row has too few tokens yet."""
        left = {i: ends for i, (n, ends) in self._awaited.items() if n > self._n_noted}
        if not left:
            return scores
        if self._no_ends is None or self._n_noted >= self._no_ends_until:
            self._no_ends_until = min(self._awaited[i][0] for i in left)
            # A model's end tokens may lie beyond its head, and there they are never chosen.
            pairs = [(i, end) for i, ends in left.items() for end in ends if end < scores.shape[-1]]
            rows, tokens = [i for i, _ in pairs], [end for _, end in pairs]
            self._no_ends = (
                torch.tensor(rows, dtype=torch.long, device=self._device),
                torch.tensor(tokens, dtype=torch.long, device=self._device),
            )
        return scores.index_put(self._no_ends, torch.tensor(-torch.inf, device=scores.device))

    def note(self, tokens: Tensor) -> None:
        """Takes the tokens [rows] that were chosen."""
        self._n_noted += 1
        self._note_seen(tokens)
        self._note_counts(tokens)

    def _note_seen(self, tokens: Tensor) -> None:
        if self._seen is not None:
            self._seen.scatter_(1, tokens.index_select(0, self._repeating_at)[:, None], 1.0)

    def _note_counts(self, tokens: Tensor) -> None:
        if self._counts is not None:
            chosen = tokens.index_select(0, self._penalized_at)[:, None]
            self._counts.scatter_add_(1, chosen, torch.ones_like(chosen, dtype=self._counts.dtype))

    def _dense(self, values: Sequence[Sequence[tuple[int, float]]], n_vocab: int) -> Tensor:
        """[rows, vocabulary] float32 with the sums of these values, elsewhere 0; without tokens beyond it."""
        dense = torch.zeros(len(values), n_vocab)
        for row, given in zip(dense, values, strict=True):
            held = [(token, value) for token, value in given if token < n_vocab]
            places = torch.tensor([token for token, _ in held], dtype=torch.long)
            row.index_add_(0, places, torch.tensor([float(value) for _, value in held]))
        return dense.to(self._device)
