"""A picture of a model's residual stream and what reads and writes it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import ValidationError
from ..figures import BLUE, RED, figure_to, plain_text

__all__ = ["plot_graph"]

_COLORS = {"attention": BLUE, "mixer": BLUE, "mlp": RED}
_GREY = "#555555"


def plot_graph(graph: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """Draws the residual stream from bottom to top, with what reads it and writes to it beside it.

    Parts of a layer that run in parallel stand at one height.

    Args:
        graph: from ``model_graph`` or ``model.get_graph``.
        path: a .png, .svg or .pdf file to write.

    Raises:
        ValidationError: a graph without a residual stream, another ending, or matplotlib isn't installed.
    """
    shown = [node for node in graph if node.get("role")]
    if not shown:
        raise ValidationError(
            "no module of this graph writes to a residual stream, so there is nothing to draw."
        )
    heights = _heights(shown)
    with figure_to(path, 7, 1 + 0.42 * (max(heights) + 1)) as figure:
        axes = figure.add_subplot()
        axes.plot([0, 0], [heights[0], heights[-1]], color=_GREY, linewidth=3, zorder=0)
        for node, height in zip(shown, heights, strict=True):
            side = {"attention": -1, "mixer": -1, "mlp": 1}.get(node["role"], 0)
            color = _COLORS.get(node["role"], _GREY)
            if side:
                for shift in (-0.16, 0.16):  # reads below, writes above
                    ends = ((0, height + shift), (side * 0.35, height + shift))
                    tail, head = ends if shift < 0 else ends[::-1]
                    axes.annotate("", head, tail, arrowprops={"arrowstyle": "->", "color": color})
            heads = f", {node['heads']} heads" if node["heads"] else ""
            axes.text(
                side * 0.38,
                height,
                "\n".join(map(plain_text, (node["path"], node["type"] + heads))),
                ha={-1: "right", 0: "center", 1: "left"}[side],
                va="center",
                fontsize=7,
                color=color,
                bbox={"facecolor": "white", "edgecolor": color, "boxstyle": "round"},
            )
        axes.set(xlim=(-2, 2), ylim=(min(heights) - 1, max(heights) + 1))
        axes.set_axis_off()


def _heights(nodes: Sequence[Mapping[str, Any]]) -> list[float]:
    """A height for each node: one more than that of the node before, unless the two run side by side."""
    found: list[float] = []
    for n, node in enumerate(nodes):
        before = nodes[n - 1] if n else None
        beside = (
            before is not None
            and node["parallel"]
            and before["layer"] == node["layer"]
            and before["parallel"]
        )
        found.append(0.0 if before is None else found[-1] if beside else found[-1] + 1.2)
    return found
