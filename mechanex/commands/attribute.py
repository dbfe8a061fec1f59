"""``mechanex attribute``: what an answer hangs on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from ..engine.attribution.edge_scores import attribution_edges
from ..engine.attribution.plots import plot_circuit, plot_scores
from ..engine.attribution.scores import attribution_scores
from ..engine.figures import check_figure
from ..engine.models.resolve import load
from .console import console, echo_json, model_text

__all__ = ["run_edges", "run_scores"]


def run_scores(
    model: str,
    *,
    clean: str,
    corrupted: str,
    top: int,
    plot: Path | None,
    as_json: bool,
    device: str | None,
    dtype: str | None,
    **options: Any,
) -> None:
    """Prints the modules and attention heads that count most, each with its position.

    Raises:
        MechanexError: whatever the engine finds wrong with the model, the prompts or the paths.
    """
    if plot is not None:
        check_figure(plot)
    loaded = load(model, backend="transformers", device=device, dtype=dtype)
    found = attribution_scores(
        loaded.model, clean, corrupted, tokenizer=loaded.tokenizer, **options
    ).to_dict()
    if plot is not None:
        plot_scores(found, plot)
    if as_json:
        echo_json({"model": loaded.name, **found})
        return
    _print_metric(found)
    modules = [(path, score, found["positions"][path]) for path, score in found["scores"].items()]
    heads = [
        (f"{path} head {n}", score, found["head_positions"][path][n])
        for path, scores in found["heads"].items()
        for n, score in enumerate(scores)
    ]
    for title, rows in (("module", modules), ("head", heads)):
        if rows:
            console().print(_table(title, rows, found["tokens"]["corrupted"], top))
    _say_written(plot)


def run_edges(
    model: str,
    circuit: int | None,
    *,
    clean: str,
    corrupted: str,
    top: int,
    plot: Path | None,
    as_json: bool,
    device: str | None,
    dtype: str | None,
    **options: Any,
) -> None:
    """Prints the edges that count most, or a circuit of so many with its faithfulness.

    Raises:
        MechanexError: whatever the engine finds wrong with the model or the prompts.
    """
    if plot is not None:
        check_figure(plot)
    loaded = load(model, backend="transformers", device=device, dtype=dtype)
    scores = attribution_edges(loaded.model, clean, corrupted, tokenizer=loaded.tokenizer, **options)
    kept = None if circuit is None else scores.circuit(circuit)
    found = scores.to_dict(kept)
    if plot is not None:
        plot_circuit(found if kept is not None else {**found, "edges": found["edges"][:top]}, plot)
    if as_json:
        echo_json({"model": loaded.name, **found})
        return
    _print_metric(found)
    table = Table()
    for column in ("source", "target"):
        table.add_column(column, overflow="fold")
    table.add_column("score", justify="right")
    for edge in found["edges"] if kept is not None else found["edges"][:top]:
        table.add_row(edge["source"], edge["target"], f"{edge['score']:+.4f}")
    console().print(table)
    if kept is not None:
        click.echo(f"Faithfulness of {len(kept.edges)} of {kept.n_all} edges: {kept.faithfulness:.3f}")
    _say_written(plot)


def _print_metric(found: Mapping[str, Any]) -> None:
    metric = found["metric"]
    answers = " against ".join(repr(answer) for answer in metric["answers"])
    line = f"{answers}: {metric['clean']:.3f} clean, {metric['corrupted']:.3f} corrupted"
    console().print(model_text(line))


def _table(
    title: str, rows: Sequence[tuple[str, float, Sequence[float]]], tokens: Sequence[Any], top: int
) -> Table:
    table = Table()
    table.add_column(title, overflow="fold")
    table.add_column("score", justify="right")
    table.add_column("most at")
    for name, score, positions in sorted(rows, key=lambda row: -abs(row[1]))[:top]:
        at = max(range(len(positions)), key=lambda n: abs(positions[n]))
        table.add_row(name, f"{score:+.4f}", model_text(f"{at} {str(tokens[at])!r}"))
    return table


def _say_written(path: Path | None) -> None:
    if path is not None:
        click.echo(f"Written: {path}", err=True)
