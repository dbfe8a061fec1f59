"""Penalties for what an answer has already, and biases of single tokens, for all rows of a batch."""

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
        self._biases: Tensor | None = None
        self._counts: Tensor | None = None
        if self._penalized:
            column = [requests[i] for i in self._penalized]
            self._frequency = torch.tensor([r.frequency_penalty for r in column], device=device)[:, None]
            self._presence = torch.tensor([r.presence_penalty for r in column], device=device)[:, None]
            self._penalized_at = torch.tensor(self._penalized, device=device)
        if self._biased:
            self._biased_at = torch.tensor(self._biased, device=device)

    def __call__(self, logits: Tensor) -> Tensor:
        """The float32 logits [rows, vocabulary] with every row's biases and penalties, out of place."""
        scores = logits
        if self._biased:
            if self._biases is None:
                self._biases = self._dense(self._given_biases, logits.shape[-1])
            scores = scores.index_add(0, self._biased_at, self._biases)
        if self._penalized:
            if self._counts is None:
                self._counts = self._dense(self._given_counts, logits.shape[-1])
                if self._unread is not None:
                    self.note(self._unread)
            taken = self._frequency * self._counts + self._presence * (self._counts > 0)
            scores = scores.index_add(0, self._penalized_at, taken, alpha=-1)
        return scores

    def note(self, tokens: Tensor) -> None:
        """Counts the tokens [rows] that were chosen."""
        if self._counts is not None:
            chosen = tokens.index_select(0, self._penalized_at)[:, None]
            self._counts.scatter_add_(1, chosen, torch.ones_like(chosen, dtype=self._counts.dtype))

    def _dense(self, values: Sequence[Sequence[tuple[int, float]]], n_vocab: int) -> Tensor:
        """[rows, vocabulary] float32 with the sums of these values, elsewhere 0."""
        dense = torch.zeros(len(values), n_vocab)
        for row, given in zip(dense, values, strict=True):
            places = torch.tensor([token for token, _ in given], dtype=torch.long)
            row.index_add_(0, places, torch.tensor([float(value) for _, value in given]))
        return dense.to(self._device)
