"""Pictures of attribution: scores of layers and positions, and a circuit."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import ValidationError
from ..figures import BLUE, RED, figure_to, plain_text

__all__ = ["plot_circuit", "plot_scores"]

_UP, _DOWN = BLUE, RED
_COLUMNS = {"attention": 0.0, "mixer": 0.0, "mlp": 2.0}


def plot_scores(scores: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Draws scores as layers against positions, a panel for each role: blue raises the metric, orange lowers it.

    Args:
        scores: from ``NodeScores.to_dict`` or ``attribution.compute_scores``, with positions.
        path: a .png, .svg or .pdf file to write.

    Raises:
        ValidationError: scores without positions, another ending, or matplotlib isn't installed.
    """
    rows: Mapping[str, Sequence[float]] = scores["positions"]
    if not rows:
        raise ValidationError("these scores have no positions to draw: compute them with positions=True.")
    panels: dict[str, list[str]] = {}
    for one in rows:
        panels.setdefault(scores["roles"].get(one, "module"), []).append(one)
    tokens = [plain_text(token) for token in scores["tokens"]["corrupted"]]
    most = max((abs(value) for row in rows.values() for value in row), default=0.0) or 1.0
    heights = [len(paths) for paths in panels.values()]
    size = (3 + 0.35 * len(tokens), 1.5 + 0.22 * sum(heights) + 0.4 * len(heights))
    with figure_to(path, *size) as figure:
        from matplotlib.colors import LinearSegmentedColormap

        colors = LinearSegmentedColormap.from_list("gain", [_DOWN, "white", _UP])
        all_axes = figure.subplots(len(panels), 1, squeeze=False, sharex=True, height_ratios=heights)[:, 0]
        for axes, (role, paths) in zip(all_axes, panels.items(), strict=True):
            picture = axes.imshow(
                [rows[one] for one in paths], cmap=colors, vmin=-most, vmax=most, aspect="auto"
            )
            layers = [scores["layers"].get(one) for one in paths]
            names = [one if layer is None else str(layer) for one, layer in zip(paths, layers, strict=True)]
            axes.set_yticks(range(len(paths)), names, fontsize=7)
            axes.set_title(role, fontsize=9, loc="left")
        all_axes[-1].set_xticks(range(len(tokens)), tokens, rotation=60, ha="right", fontsize=7)
        figure.colorbar(picture, ax=list(all_axes), label="gain of the metric", shrink=0.8)


def plot_circuit(edges: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Draws a circuit from the embedding at the bottom to the logits at the top; wide edges count most.

    Args:
        edges: from ``EdgeScores.to_dict``.
        path: a .png, .svg or .pdf file to write.

    Raises:
        ValidationError: no edges, another ending, or matplotlib isn't installed.
    """
    listed = edges["edges"]
    if not listed:
        raise ValidationError("this circuit has no edges to draw.")
    places = _places(edges)
    most = max(abs(edge["score"]) for edge in listed) or 1.0
    top = max(height for _, height in places.values())
    with figure_to(path, 6, 1.5 + 0.5 * top) as figure:
        axes = figure.add_subplot()
        for edge in listed:
            weight = abs(edge["score"]) / most
            axes.annotate(
                "",
                places[edge["target"]],
                places[edge["source"]],
                arrowprops={
                    "arrowstyle": "->",
                    "color": _UP if edge["score"] > 0 else _DOWN,
                    "linewidth": 0.3 + 3 * weight,
                    "alpha": 0.35 + 0.65 * weight,
                    "connectionstyle": "arc3,rad=0.12",
                    "shrinkA": 10,
                    "shrinkB": 10,
                },
            )
        for name, (x, y) in places.items():
            box = {"facecolor": "white", "edgecolor": "#555555", "boxstyle": "round"}
            axes.text(x, y, plain_text(name), ha="center", va="center", fontsize=7, bbox=box)
        axes.set(xlim=(-1, 3), ylim=(-0.7, top + 0.7))
        axes.set_axis_off()


def _places(edges: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """Where each end of an edge stands: in its role's column, above all that run before it."""
    ends = {edge[end] for edge in edges["edges"] for end in ("source", "target")}
    order = [one for one in (*edges["roles"], "logits") if one in ends]
    return {one: (_COLUMNS.get(edges["roles"].get(one, ""), 1.0), float(n)) for n, one in enumerate(order)}
