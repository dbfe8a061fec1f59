"""What there is to show of a feature, and pictures of it; knows no model."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from ..figures import BLUE
from .html import bars, block, legend, shaded, table, write_page
from .plots import COLUMNS, HIGH, picture, put_bars, put_text, text_lines
from .shading import Shade
from .traces import as_picture

__all__ = ["Dashboard", "Effect", "Passage"]


@dataclass(frozen=True)
class Passage:
    """A part of a text around a feature's strongest activation there.

    Args:
        tokens: texts of its tokens.
        values: what the feature says of each.
        at: which one is the strongest.
    """

    tokens: tuple[str, ...]
    values: tuple[float, ...]
    at: int

    @property
    def strongest(self) -> float:
        """What the feature says of the strongest token."""
        return self.values[self.at]

    def shades(self, most: float) -> list[Shade]:
        """The tokens as pictures show them."""
        return [
            Shade(text, value / most if most > 0 else 0.0, i == self.at, note=f"{value:.3g}")
            for i, (text, value) in enumerate(zip(self.tokens, self.values, strict=True))
        ]


@dataclass(frozen=True)
class Effect:
    """A token, and by how much its logit changes."""

    token: str
    change: float


@dataclass(frozen=True)
class Dashboard:
    """A feature at a glance; in a notebook it shows itself.

    Args:
        feature: its number.
        source: where its autoencoder was read from.
        point: where that reads.
        n_tokens: tokens that were looked at.
        n_active: those of which it said something.
        counts, edges: how many of these lie between one edge and the next.
        passages: where it says most, the strongest first.
        promoted, suppressed: tokens whose logits it raises and lowers most; empty where that can't be told.
    """

    feature: int
    source: str
    point: str
    n_tokens: int
    n_active: int
    counts: tuple[int, ...]
    edges: tuple[float, ...]
    passages: tuple[Passage, ...]
    promoted: tuple[Effect, ...]
    suppressed: tuple[Effect, ...]

    @property
    def title(self) -> str:
        """Which feature it is, and how often it is active."""
        share = 100 * self.n_active / max(self.n_tokens, 1)
        return f"feature {self.feature} at {self.point}: active in {share:.2g} % of {self.n_tokens:,} tokens"

    def as_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        told = dict(vars(self))
        for name in ("passages", "promoted", "suppressed"):
            told[name] = [dict(vars(one)) for one in told[name]]
        return told

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a picture of it.

        Args:
            path: an ``.html`` or a ``.png`` file.

        Raises:
            ValidationError: another suffix, or a PNG without matplotlib.
        """
        target = as_picture(path)
        if target.suffix.lower() == ".html":
            write_page(target, self.title, self._repr_html_())
            return
        most = max((one.strongest for one in self.passages), default=0.0)
        lines = text_lines([Shade(self.title, strong=False)])
        for one in self.passages:
            lines += [[], *text_lines([Shade(f"{one.strongest:8.3g}  "), *one.shades(most)])]
        text_high, figure_high = len(lines) * HIGH + 0.3, 2.6
        width, height = 0.4 + COLUMNS * 0.0753, text_high + figure_high
        with picture(target, width, height) as figure:
            put_text(figure, lines, 0.2, 0.05)
            low, high = 0.45 / height, (figure_high - 0.8) / height
            axes = figure.add_axes((0.06, low, 0.25, high))
            if self.edges:
                widths = [b - a for a, b in zip(self.edges, self.edges[1:], strict=False)]
                axes.bar(self.edges[:-1], self.counts, widths, align="edge", color=BLUE)
                axes.set_yscale("log")
            axes.set_title("tokens by activation", fontsize=9)
            axes.tick_params(labelsize=7)
            axes.spines[["top", "right"]].set_visible(False)
            for left, name, effects in (
                (0.45, "logits raised", self.promoted),
                (0.79, "logits lowered", self.suppressed),
            ):
                axes = figure.add_axes((left, low, 0.19, high))
                put_bars(axes, [one.token for one in effects], [one.change for one in effects], name)

    def _repr_html_(self) -> str:
        most = max((one.strongest for one in self.passages), default=0.0)
        parts = [f"<b>{legend([], self.title)}</b>"]
        parts += [bars(self.counts, self.edges, "tokens by activation (heights are logarithms)")]
        parts += [
            table([name, "logit"], [(one.token, one.change) for one in effects])
            for name, effects in (("raised", self.promoted), ("lowered", self.suppressed))
            if effects
        ]
        for one in self.passages:
            parts.append(shaded(one.shades(most), f"{one.strongest:.3g} "))
        return block(
            [*parts, legend([], "framed: the strongest token; the colour tells how much the feature says")]
        )
