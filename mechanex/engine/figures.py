"""Figures drawn by matplotlib, which is imported when one is drawn and needs no display."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import ValidationError
from ..home import atomic_path

__all__ = ["BLUE", "RED", "figure_to", "plain_text"]

BLUE, RED = "#0072b2", "#d55e00"  # of Okabe and Ito's palette, told apart in every kind of colour vision
FORMATS = (".png", ".svg", ".pdf")


@contextmanager
def figure_to(path: str | os.PathLike[str], width: float, height: float) -> Iterator[Any]:
    """A figure, written to a file when the block ends without an error.

    Args:
        path: ends with .png, .svg or .pdf.
        width, height: inches.

    Raises:
        ValidationError: another ending, or matplotlib isn't installed.
    """
    target = Path(path)
    if target.suffix.lower() not in FORMATS:
        raise ValidationError(f"a figure is a file that ends with {', '.join(FORMATS)}; got {str(path)!r}.")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValidationError(
            "figures are drawn by matplotlib, which isn't installed: pip install 'mechanex[plot]'."
        ) from error
    figure = Figure(figsize=(width, height), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
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
