"""Figures drawn by matplotlib, which is imported when one is drawn and needs no display."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from ..errors import ValidationError
from ..extras import install_line
from ..home import atomic_path

__all__ = ["BLUE", "RED", "check_figure", "figure_to", "new_figure", "plain_text"]

BLUE, RED = "#0072b2", "#d55e00"  # of Okabe and Ito's palette, told apart in every kind of colour vision
Layout = Literal["constrained"] | None
FORMATS = (".png", ".svg", ".pdf")


def new_figure(width: float, height: float, *, layout: Layout = "constrained", instead: str = "") -> Any:
    """A white figure.

    Args:
        width, height: inches.
        layout: matplotlib's; None where everything is put at a place of its own.
        instead: what else may be done where matplotlib is missing, for the message.

    Raises:
        ValidationError: matplotlib isn't installed.
    """
    figure_class, canvas = _classes(instead)
    figure = figure_class(figsize=(width, height), facecolor="white", layout=layout)
    canvas(figure)
    return figure


def _classes(instead: str = "") -> tuple[Any, Any]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValidationError(
            "figures are drawn by matplotlib, which isn't installed: "
            f"{install_line('plot')}{', ' + instead if instead else ''}."
        ) from error
    return Figure, FigureCanvasAgg


def check_figure(path: str | os.PathLike[str], *, instead: str = "") -> Path:
    """The path of a figure that can be drawn; to be asked before work that takes long.

    Args:
        path: ends with .png, .svg or .pdf.
        instead: as for :func:`new_figure`.

    Raises:
        ValidationError: another ending, or matplotlib isn't installed.
    """
    target = Path(path)
    if target.suffix.lower() not in FORMATS:
        raise ValidationError(f"a figure is a file that ends with {', '.join(FORMATS)}; got {str(path)!r}.")
    _classes(instead)
    return target


@contextmanager
def figure_to(
    path: str | os.PathLike[str],
    width: float,
    height: float,
    *,
    layout: Layout = "constrained",
    instead: str = "",
) -> Iterator[Any]:
    """A figure, written to a file when the block ends without an error.

    Args:
        path: ends with .png, .svg or .pdf.
        width, height, layout, instead: as for :func:`new_figure`.

    Raises:
        ValidationError: another ending, or matplotlib isn't installed.
    """
    target = check_figure(path, instead=instead)
    figure = new_figure(width, height, layout=layout, instead=instead)
    yield figure
    with warnings.catch_warnings(), atomic_path(target) as temporary:
        warnings.filterwarnings("ignore", "Glyph .* missing")  # an empty box stands for it
        figure.savefig(temporary, format=target.suffix[1:].lower(), dpi=150)


def plain_text(text: Any) -> str:
    """A token as a label: no line breaks, and no $ that would begin a formula."""
    shown = "".join(
        char if char.isprintable() else "\u23ce" if char == "\n" else "\ufffd" for char in str(text)
    )
    return shown.replace("$", r"\$")
