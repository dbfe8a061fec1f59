"""Circuits: few edges that do what the model does, and how well they do it while all others are corrupted."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ...errors import ValidationError
from ..models.adapter import ModelAdapter
from ..ranks import by_stretch, current_ranks
from ..structure.components import Component
from .edges import Edge, EdgeRuns, name_of
from .metrics import check_metric
from .runs import ids_of
from .sites import rows_at_once
from .streams import FINAL, Reader, StreamRun, added, sources_of

__all__ = [
    "SHARES",
    "Circuit",
    "Curve",
    "Selection",
    "choose_edges",
    "circuit_metrics",
    "curve_of",
    "measured",
]

Selection = Literal["greedy", "threshold"]

SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""The shares of edges at which the Mechanistic Interpretability Benchmark looks (arXiv:2504.13151)."""


@dataclass(frozen=True)
class Circuit:
    """Edges that are kept, and what the clean prompt gives when all others carry what they carry in the corrupted run.

    Args:
        edges: the edges.
        n_all: edges of the whole model.
        metric: of the circuit's run.
        faithfulness: the metric, as a share of the way from the corrupted run's (0) to the clean run's (1).
    """

    edges: tuple[Edge, ...]
    n_all: int
    metric: float
    faithfulness: float


@dataclass(frozen=True)
class Curve:
    """Faithfulness against the share of edges that are kept.

    Args:
        shares: ascending.
        faithfulness: at each.
        area: under the curve; of edges chosen by gain, the benchmark's CPR: the higher the better.
        distance: area between the curve and 1; of edges chosen by magnitude, its CMD: the lower the better.
    """

    shares: tuple[float, ...]
    faithfulness: tuple[float, ...]
    area: float
    distance: float


def choose_edges(
    scores: Mapping[Edge, float], n: int, how: Selection = "greedy", *, by_gain: bool = False
) -> list[Edge]:
    """Edges that count most and lead on to the logits, at most ``n`` of them, best first.

    Args:
        scores: of all edges.
        n: how many.
        how: ``"greedy"``: from the logits backwards, always the best edge into what is there already;
            ``"threshold"``: the best of all, less those that lead nowhere.
        by_gain: the best are those of the highest score; else of the highest absolute score.

    Raises:
        ValidationError: another ``how``.
    """

    def worth(edge: Edge) -> float:
        return scores[edge] if by_gain else abs(scores[edge])

    if how not in get_args(Selection):
        raise ValidationError(f"how is one of {', '.join(get_args(Selection))}; got {how!r}.")
    if how == "threshold":
        return _leading_on(sorted(scores, key=worth, reverse=True)[:n])
    into: dict[str, list[Edge]] = {}
    for edge in scores:
        into.setdefault(edge.target, []).append(edge)
    reached, found, order = {FINAL}, list[Edge](), {edge: i for i, edge in enumerate(scores)}
    open_edges = [(-worth(edge), order[edge], edge) for edge in into.get(FINAL, [])]
    heapq.heapify(open_edges)
    while open_edges and len(found) < n:
        edge = heapq.heappop(open_edges)[2]
        found.append(edge)
        if edge.source not in reached:
            reached.add(edge.source)
            for one in into.get(edge.source, []):
                heapq.heappush(open_edges, (-worth(one), order[one], one))
    return found


def _leading_on(edges: Sequence[Edge]) -> list[Edge]:
    reached, before = {FINAL}, 0
    while len(reached) != before:
        before = len(reached)
        reached |= {edge.source for edge in edges if edge.target in reached}
    return [edge for edge in edges if edge.target in reached]


def circuit_metrics(
    adapter: ModelAdapter, runs: EdgeRuns, circuits: Sequence[Collection[Edge]]
) -> list[float]:
    """The metric of the clean prompt for each circuit, all edges outside of it carrying the corrupted run's values.

    Args:
        adapter: the model.
        runs: both runs.
        circuits: the edges of each; circuits run as rows of a batch.
    """

    def metrics(rows: range) -> list[float]:
        some = [frozenset(circuit) for circuit in circuits[rows.start : rows.stop]]
        run = StreamRun(adapter, runs.structure, _within(runs, some))
        with torch.no_grad():
            logits = run.logits(ids_of(adapter, runs.pair.clean, len(some)))
            found: list[float] = check_metric(runs.metric(logits), len(some)).tolist()
        return found

    at_once = rows_at_once(adapter, len(runs.pair.clean))
    return by_stretch(current_ranks(adapter), len(circuits), at_once, metrics)


def _within(runs: EdgeRuns, circuits: Sequence[frozenset[Edge]]) -> Any:
    """Reads what is written along a circuit's edges, and the corrupted run's writes along all others."""
    at, theirs = runs.pair.clean_at, runs.pair.corrupted_at

    def read(reader: Reader, writes: Mapping[str, Tensor]) -> Tensor:
        sources = sources_of(runs.structure, reader)
        return added([along(component, reader, writes[component.path]) for component in sources])

    def along(component: Component, reader: Reader, write: Tensor) -> Tensor:
        edge = Edge(component.path, name_of(reader))
        kept = torch.tensor([edge in circuit for circuit in circuits], device=write.device)[:, None, None]
        other = write.clone()
        other[:, at] = runs.corrupted[component.path][theirs]
        return torch.where(kept, write, other)

    return read


def measured(adapter: ModelAdapter, runs: EdgeRuns, circuits: Sequence[Sequence[Edge]]) -> list[Circuit]:
    """Circuits with what they do.

    Raises:
        ValidationError: both runs have the same metric, so that there is nothing to keep.
    """
    gap = runs.clean_metric - runs.corrupted_metric
    if gap == 0:
        raise ValidationError(
            f"both prompts give the metric {runs.clean_metric:.4g}, so that no circuit makes a difference: choose "
            "prompts with different answers, or another metric."
        )
    n_all = len(runs.edges)
    return [
        Circuit(tuple(edges), n_all, metric, (metric - runs.corrupted_metric) / gap)
        for edges, metric in zip(circuits, circuit_metrics(adapter, runs, circuits), strict=True)
    ]


def curve_of(
    adapter: ModelAdapter,
    runs: EdgeRuns,
    scores: Mapping[Edge, float],
    how: Selection = "greedy",
    *,
    by_gain: bool = False,
    shares: Sequence[float] = SHARES,
) -> Curve:
    """How faithful circuits of growing size are.

    Args:
        adapter: the model.
        runs: both runs.
        scores: of all edges.
        how, by_gain: as for :func:`choose_edges`.
        shares: of edges, each above 0 and at most 1.
    """
    if not shares or not all(0 < share <= 1 for share in shares):
        raise ValidationError(f"shares are numbers above 0 and up to 1; got {shares!r}.")
    ordered = tuple(sorted(shares))
    chosen = [choose_edges(scores, round(share * len(scores)), how, by_gain=by_gain) for share in ordered]
    values = tuple(circuit.faithfulness for circuit in measured(adapter, runs, chosen))
    x = torch.tensor([0.0, *ordered], dtype=torch.float64)
    y = torch.tensor([0.0, *values], dtype=torch.float64)
    area, distance = float(torch.trapezoid(y, x)), float(torch.trapezoid((1 - y).abs(), x))
    return Curve(ordered, values, area, distance)
