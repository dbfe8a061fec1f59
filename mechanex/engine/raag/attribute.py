"""Which chunks an answer's tokens rest on: drops, edges, and what chance alone would give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.adapter import ModelAdapter
from .knockouts import AnsweredPrompt, Knockouts, Span

__all__ = ["Attribution", "ChunkEdge", "attribute"]

REMOVED = 8
"""Chunks that are removed by default: the best candidates that blocking names."""
SHUFFLES = 20
"""Shuffled readings whose largest drop an edge has to exceed: about one answer in 21 passes by chance."""
LEAST_DROP = 0.1
"""Nats that a candidate costs at least; less is within what other wording changes."""


@dataclass(frozen=True)
class ChunkEdge:
    """A token of the answer that rests on a chunk.

    Attributes:
        token: its number in the answer.
        chunk: which of the spans.
        weight: nats that the token loses when the chunk is blocked (removed, where the model can't be blocked).
        removed: nats that it loses when the chunk is removed; NaN where that wasn't tried.
        best_layer: the layer at which alone blocking costs most; None for candidates, and where layers can't be told
            apart.
    """

    token: int
    chunk: int
    weight: float
    removed: float
    best_layer: int | None = None


@dataclass(frozen=True, eq=False)
class Attribution:
    """What an answer rests on.

    Attributes:
        logprobs: [n_answer] natural log-probabilities of the answer's tokens, with all chunks.
        blocked: [n_chunks, n_answer] their drop when question and answer can't attend to a chunk; None where the model
            takes no such mask.
        removed: [n_chunks, n_answer] their drop when the chunk was never there; NaN for chunks that weren't tried.
        threshold: nats that a validated edge exceeds.
        null: the largest drop of each shuffled reading, ascending.
        candidates: edges above ``LEAST_DROP``, heaviest first.
        validated: those of them whose drops both exceed the threshold.
    """

    logprobs: Tensor
    blocked: Tensor | None
    removed: Tensor
    threshold: float
    null: list[float]
    candidates: list[ChunkEdge]
    validated: list[ChunkEdge]

    @property
    def drops(self) -> Tensor:
        """[n_chunks, n_answer] drops that edges are weighed by."""
        return self.removed if self.blocked is None else self.blocked


def attribute(
    adapter: ModelAdapter,
    reading: AnsweredPrompt,
    spans: Sequence[Span],
    *,
    n_removed: int | None = None,
    seed: int = 0,
    shuffles: int = SHUFFLES,
) -> Attribution:
    """Finds the chunks that an answer's tokens rest on.

    Args:
        adapter: the model.
        reading: the prompt and its answer.
        spans: the chunks, tokens of ``reading.context``.
        n_removed: how many of the best candidates are removed too; None for ``REMOVED``. All are, where the model
            can't be blocked.
        seed: of the shuffles.
        shuffles: how many there are; without any the threshold is ``LEAST_DROP``.
    """
    knockouts = Knockouts(adapter, reading)
    blocking = knockouts.can_block
    base, blocked = _drops(knockouts, spans)
    n_removed = REMOVED if n_removed is None else n_removed
    order = blocked.amax(1).argsort(descending=True, stable=True).tolist()
    tried = sorted(order[:n_removed])
    removed = torch.full_like(blocked, torch.nan)
    if not blocking:
        removed = blocked
    elif tried:
        removed[tried] = base - knockouts.removed([spans[i] for i in tried])
    generator = torch.Generator().manual_seed(seed)
    null = sorted(
        float(_drops(Knockouts(adapter, _shuffled(reading, spans, generator)), spans)[1].max())
        for _ in range(shuffles)
    )
    threshold = max([LEAST_DROP, *null])
    candidates = [
        ChunkEdge(token, chunk, float(blocked[chunk, token]), float(removed[chunk, token]))
        for chunk, token in (blocked > LEAST_DROP).nonzero().tolist()
    ]
    candidates.sort(key=lambda edge: -edge.weight)
    # NaN, of a chunk that wasn't removed, exceeds nothing.
    validated = [edge for edge in candidates if edge.weight > threshold and edge.removed > threshold]
    if blocking:
        validated = _with_layers(knockouts, spans, base, validated, adapter.n_layers)
    return Attribution(base, blocked if blocking else None, removed, threshold, null, candidates, validated)


def _drops(knockouts: Knockouts, spans: Sequence[Span]) -> tuple[Tensor, Tensor]:
    """([n_answer] log-probabilities with all chunks, [n_chunks, n_answer] what each chunk's loss costs)."""
    whole = [(0, 0), *spans]
    found = knockouts.blocked(whole) if knockouts.can_block else knockouts.removed(whole)
    assert found is not None
    return found[0], found[0] - found[1:]


def _shuffled(reading: AnsweredPrompt, spans: Sequence[Span], generator: torch.Generator) -> AnsweredPrompt:
    """The same reading with the chunks' tokens in a random order, and none that the answer alone has.

    Chunks of this kind hold nothing that the answer could rest on.
    """
    context = list(reading.context)
    places = [i for first, end in spans for i in range(first, end)]
    held = set(reading.answer) - set(reading.question)
    rest = [context[i] for i in places if context[i] not in held] or list(reading.question)
    order = torch.randperm(len(places), generator=generator).tolist()
    drawn = torch.randint(len(rest), (len(places),), generator=generator).tolist()
    moved = [context[places[i]] for i in order]
    for place, token, other in zip(places, moved, drawn, strict=True):
        context[place] = rest[other] if token in held else token
    return AnsweredPrompt(tuple(context), reading.question, reading.answer)


def _with_layers(
    knockouts: Knockouts, spans: Sequence[Span], base: Tensor, edges: Sequence[ChunkEdge], n: int
) -> list[ChunkEdge]:
    """The edges with the layer, of ``n``, at which alone a block costs most."""
    chunks = sorted({edge.chunk for edge in edges})
    if not chunks:
        return []
    found = knockouts.blocked([spans[chunk] for chunk in chunks for _ in range(n)], [*range(n)] * len(chunks))
    if found is None:
        return list(edges)
    drops = dict(zip(chunks, (base - found).reshape(len(chunks), n, -1), strict=True))
    return [
        ChunkEdge(e.token, e.chunk, e.weight, e.removed, int(drops[e.chunk][:, e.token].argmax()))
        for e in edges
    ]
