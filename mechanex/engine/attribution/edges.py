"""Edges of a model: how much of what one component writes counts through what another reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import ValidationError
from ..models.adapter import ModelAdapter
from ..ranks import by_stretch, current_ranks
from ..structure.graph import Structure
from .metrics import Answer, Metric, check_metric, summed
from .nodes import way_points
from .prompts import PromptPair
from .runs import ids_of, run_pair
from .sites import rows_at_once
from .streams import FINAL, Reader, StreamRun, everything, readers_of, sources_of

__all__ = ["Edge", "EdgeRuns", "edge_runs", "exact_edges", "gradient_edges", "name_of"]


@dataclass(frozen=True)
class Edge:
    """A way from what one component writes to what another reads.

    Args:
        source: path of the component that writes.
        target: path of the component that reads, or ``"logits"``.
    """

    source: str
    target: str


@dataclass(eq=False)
class EdgeRuns:
    """Both runs, component by component.

    Attributes:
        structure: of the model.
        pair: the prompts.
        clean, corrupted: by path, [T, d_model] as added to the stream.
        metric: what is attributed.
        clean_metric, corrupted_metric: its values.
    """

    structure: Structure
    pair: PromptPair
    clean: dict[str, Tensor]
    corrupted: dict[str, Tensor]
    metric: Metric
    clean_metric: float
    corrupted_metric: float

    @property
    def edges(self) -> list[Edge]:
        """Every edge of the model, in the order in which its components run."""
        return [
            Edge(component.path, name_of(reader))
            for reader in readers_of(self.structure)
            for component in sources_of(self.structure, reader)
        ]

    def delta(self, path: str) -> Tensor:
        """[T corrupted, d_model] float32, clean minus corrupted writes."""
        return self.pair.delta(self.clean[path], self.corrupted[path])


def name_of(reader: Reader) -> str:
    """A reader's path, or ``"logits"``."""
    return FINAL if reader is None else reader.path


def edge_runs(
    adapter: ModelAdapter,
    tokenizer: Any,
    structure: Structure,
    pair: PromptPair,
    metric: Metric | Sequence[Answer] | None,
) -> EdgeRuns:
    """Runs both prompts without gradients and keeps what every component writes.

    Raises:
        ValidationError: the model doesn't pass on one residual stream, and what ``run_pair`` refuses.
    """
    if not structure.components or structure.components[0].role != "embedding":
        raise ValidationError(
            f"{adapter.model_id} has no edges: its layers don't pass on one residual stream, or it doesn't say which "
            "module embeds its tokens."
        )
    runs = run_pair(adapter, tokenizer, pair, [], metric)
    kept: list[dict[str, Tensor]] = []
    with torch.no_grad():
        for ids in (pair.clean, pair.corrupted):
            run = StreamRun(adapter, structure, everything(structure))
            run.logits(ids_of(adapter, ids))
            kept.append({path: write[0] for path, write in run.writes.items()})
    clean, corrupted = kept
    return EdgeRuns(structure, pair, clean, corrupted, runs.metric, runs.clean_metric, runs.corrupted_metric)


def gradient_edges(adapter: ModelAdapter, runs: EdgeRuns, steps: int) -> dict[Edge, float]:
    """(clean - corrupted write) times gradient of what the reader reads, for every edge (EAP, arXiv:2310.10348).

    Args:
        adapter: the model.
        runs: both runs.
        steps: gradients that are averaged on the way from the corrupted to the clean embeddings, packed as rows of a
            batch (EAP-IG, arXiv:2403.17806); 1 for the corrupted run's.
    """
    tokens, points = len(runs.pair.corrupted), way_points(steps)
    readers, sources = readers_of(runs.structure), runs.structure.components
    totals: dict[str, Tensor] = {}
    ranks = current_ranks(adapter)
    with ranks.together():
        for some in ranks.each(ranks.stretches(steps, rows_at_once(adapter, tokens)), steps, "Gradients"):
            for name, gradient in _gradients(adapter, runs, points[some.start : some.stop]).items():
                totals[name] = totals[name] + gradient if name in totals else gradient
    zero = torch.zeros_like(runs.corrupted[sources[0].path], dtype=torch.float32)
    totals = {name_of(one): ranks.total(totals.get(name_of(one), zero)) for one in readers}
    deltas = _rows(adapter, [runs.delta(component.path) for component in sources])
    products = deltas @ _rows(adapter, [totals[name_of(reader)] for reader in readers]).T / steps
    column = {name_of(reader): n for n, reader in enumerate(readers)}
    row = {component.path: n for n, component in enumerate(sources)}
    table = products.cpu().tolist()
    return {edge: table[row[edge.source]][column[edge.target]] for edge in runs.edges}


def _rows(adapter: ModelAdapter, values: Sequence[Tensor]) -> Tensor:
    return torch.stack([value.flatten().to(adapter.device) for value in values])


def _gradients(adapter: ModelAdapter, runs: EdgeRuns, points: Sequence[float]) -> dict[str, Tensor]:
    """By reader, [T, d_model] float32, the sum over the points of the gradient of what it reads."""
    embedding = runs.structure.components[0].path
    share = torch.tensor(points)[:, None, None]

    def start(stream: Tensor) -> Tensor:
        moved = stream.detach().float() + share.to(stream.device) * runs.delta(embedding)
        return moved.to(stream.dtype).requires_grad_(True)

    run = StreamRun(adapter, runs.structure, everything(runs.structure), start)
    logits = run.logits(ids_of(adapter, runs.pair.corrupted, len(points)))
    found = torch.autograd.grad(summed(runs.metric, logits), list(run.reads.values()), allow_unused=True)
    zero = torch.zeros_like(runs.corrupted[embedding], dtype=torch.float32)
    return {
        name: zero if gradient is None else gradient.float().sum(0)
        for name, gradient in zip(run.reads, found, strict=True)
    }


def exact_edges(adapter: ModelAdapter, runs: EdgeRuns, edges: Sequence[Edge]) -> dict[Edge, float]:
    """What the metric of the corrupted run gains from each edge alone carrying what it carries in the clean run.

    Args:
        adapter: the model.
        runs: both runs.
        edges: those that are tried, as rows of a batch.
    """

    def gains(rows: range) -> list[float]:
        some = edges[rows.start : rows.stop]
        run = StreamRun(adapter, runs.structure, _patched(runs, some))
        with torch.no_grad():
            logits = run.logits(ids_of(adapter, runs.pair.corrupted, len(some)))
            values: Tensor = check_metric(runs.metric(logits), len(some)) - runs.corrupted_metric
        found: list[float] = values.tolist()
        return found

    at_once = rows_at_once(adapter, len(runs.pair.corrupted))
    found = by_stretch(current_ranks(adapter), len(edges), at_once, gains)
    return dict(zip(edges, found, strict=True))


def _patched(runs: EdgeRuns, edges: Sequence[Edge]) -> Any:
    """Reads everything, and through one edge for each row what was written in the clean run."""
    plain = everything(runs.structure)
    mine, theirs = runs.pair.corrupted_at, runs.pair.clean_at
    sources: dict[str, list[tuple[int, str]]] = {}
    for row, edge in enumerate(edges):
        sources.setdefault(edge.target, []).append((row, edge.source))

    def read(reader: Reader, writes: Mapping[str, Tensor]) -> Tensor:
        stream = plain(reader, writes)
        for row, source in sources.get(name_of(reader), []):
            gained = runs.clean[source][theirs] - writes[source][row, mine]
            stream[row, mine] += gained.to(stream.device)
        return stream

    return read
