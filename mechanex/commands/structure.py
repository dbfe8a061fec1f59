"""``mechanex model``: what a model is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from rich.text import Text
from rich.tree import Tree

from ..engine.figures import check_figure
from ..engine.models import adapter_for
from ..engine.models.resolve import load
from ..engine.structure.graph import model_graph, model_paths
from ..engine.structure.plots import plot_graph
from .console import console, echo_json, model_text

__all__ = ["run_graph", "run_paths"]


def run_graph(
    model: str, depth: int | None, out: Path | None, options: Mapping[str, Any], as_json: bool
) -> None:
    """Prints a model's modules as a tree, and draws its residual stream where ``out`` names a file.

    Raises:
        MechanexError: no such model, or matplotlib is missing.
    """
    if out is not None:
        check_figure(out)
    loaded = load(model, backend="transformers", **options)
    nodes = model_graph(adapter_for(loaded.model))
    if out is not None:
        plot_graph(nodes, out)
    if as_json:
        echo_json({"model": loaded.name, "graph": nodes})
        return
    console().print(_tree(loaded.name, type(loaded.model).__name__, nodes, depth))
    if out is not None:
        click.echo(f"Written: {out}", err=True)


def _tree(name: str, kind: str, nodes: Sequence[Mapping[str, Any]], depth: int | None) -> Tree:
    tree = Tree(model_text(f"{name} ({kind})"))
    branches: dict[str, Tree] = {}
    for node in nodes:
        path = str(node["path"])
        if depth is not None and path.count(".") >= depth:
            continue
        parent, _, own = path.rpartition(".")
        branches[path] = branches.get(parent, tree).add(_line(own if parent in branches else path, node))
    return tree


def _line(name: str, node: Mapping[str, Any]) -> Text:
    found = model_text(name, "bold")
    found.append(f"  {node['type']}")
    if node["parameters"]:
        found.append(f"  {node['parameters']:,} parameters")
    if node["output_shape"] is not None:
        shapes = [shape for shape in (node["input_shape"], node["output_shape"]) if shape is not None]
        found.append("  " + " → ".join("[" + ", ".join(map(str, shape)) + "]" for shape in shapes))
    if node["role"]:
        more = [node["role"], *([f"{node['heads']} heads"] if node["heads"] else [])]
        more += ["parallel"] if node["parallel"] else []
        found.append(f"  ({', '.join(more)})", "cyan")
    return found


def run_paths(model: str, options: Mapping[str, Any], as_json: bool) -> None:
    """Prints the modules whose output can be patched, one a line.

    Raises:
        MechanexError: no such model.
    """
    loaded = load(model, backend="transformers", **options)
    paths = model_paths(adapter_for(loaded.model))
    if as_json:
        echo_json({"model": loaded.name, "paths": paths})
        return
    for path in paths:
        click.echo(path)
