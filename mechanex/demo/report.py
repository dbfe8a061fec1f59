"""The demo's tables, examples and plot."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from ..commands.console import console, echo_json, model_text
from ..extras import install_line

if TYPE_CHECKING:
    from .measure import Measurement, Steering

__all__ = ["Finished", "save_plot"]

_COLORS = {"angry": "#c0392b", "calm": "#2e86ab", "hopeful": "#e0a100", "gloomy": "#5d5f71"}


def save_plot(measured: Sequence[Measurement], path: Path) -> Path | None:
    """Draws share of completions and perplexity against strength; None where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9.5, 3.8), layout="constrained")
    for tone, group in _by_tone(measured):
        strengths = [one.strength for one in group]
        style: dict[str, Any] = {"marker": "o", "color": _COLORS.get(tone), "label": tone}
        left.plot(strengths, [100 * one.share for one in group], **style)
        right.plot(strengths, [one.perplexity for one in group], **style)
    left.set(
        title="completions of the tone",
        ylabel="% of held-out prompts",
        ylim=(-3, 103),
    )
    right.set(
        title="perplexity under the unsteered model",
        ylabel="per token",
    )
    right.set_ylim(bottom=0)
    left.legend(title="steered towards", frameon=False)
    for axes in (left, right):
        axes.set_xlabel("strength, in calibrated doses")
        axes.axvline(0, color="#999999", linewidth=0.8, linestyle=":")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path


@dataclass(frozen=True)
class Finished:
    """What a run of the demo found.

    Args:
        report: what ``steering.json`` holds.
        measured: one measurement per tone and strength.
        chosen: how each tone is steered.
        prompts: by tone.
        plot: the picture; None without matplotlib.
        figures: ``steering.json``.
        seconds: that it took.
    """

    report: dict[str, Any]
    measured: Sequence[Measurement]
    chosen: Sequence[Steering]
    prompts: Mapping[str, Sequence[str]]
    plot: Path | None
    figures: Path
    seconds: float

    def show(self, *, as_json: bool = False) -> None:
        """Prints how each tone is steered, figures per strength, an example of each, and the conclusion; or JSON."""
        if as_json:
            echo_json(self.report)
            return
        screen = console()
        screen.print("Strength 1 is the calibrated dose, at which 95 % of tokens move by up to 1 nat:")
        for steering in self.chosen:
            screen.print(
                f"  {steering.tone}: layer {steering.layer}, {steering.unit:.3g} times the mean difference, "
                f"whose norm is {steering.norm:.3g}",
                markup=False,
            )
        screen.print(self._table())
        screen.print(self._examples())
        for _, group in _by_tone(self.measured):
            plain, dosed = _plain_and_dosed(group)
            screen.print(
                f"{plain.tone}: {plain.share:.0%} of the completions unsteered, {dosed.share:.0%} at strength "
                f"{dosed.strength:g}; perplexity {dosed.perplexity / plain.perplexity:.2f} times the unsteered one",
                markup=False,
            )
        screen.print(f"figures: {_short(self.figures)}", markup=False)
        missing = f"plot: none, matplotlib is missing; {install_line('plot')}, and run the demo again"
        screen.print(missing if self.plot is None else f"plot: {_short(self.plot)}", markup=False)
        screen.print(f"{self.seconds:.0f} s", markup=False)

    def _table(self) -> Table:
        table = Table(title="mx-tiny on prompts that gave neither vectors nor settings")
        table.add_column("steered towards")
        for heading in (
            "strength",
            "completions of the tone",
            "tone words per 100",
            "perplexity (unsteered model)",
        ):
            table.add_column(heading, justify="right")
        for tone, group in _by_tone(self.measured):
            for one in group:
                table.add_row(
                    tone if one is group[0] else "",
                    f"{one.strength:+g}" if one.strength else "0",
                    f"{one.share:.0%}",
                    f"{one.words:.1f}",
                    f"{one.perplexity:.2f}",
                    end_section=one is group[-1],
                )
        return table

    def _examples(self) -> Table:
        examples = Table(title="the same prompt and seed at strength 0 and 1", show_lines=True)
        for heading in ("tone", "prompt", "unsteered", "steered"):
            examples.add_column(heading, overflow="fold")
        for tone, group in _by_tone(self.measured):
            plain, dosed = _plain_and_dosed(group)
            shown = _telling(plain, dosed)
            examples.add_row(
                tone,
                model_text(self.prompts[tone][shown]),
                model_text(plain.completions[shown]),
                model_text(dosed.completions[shown]),
            )
        return examples


def _plain_and_dosed(group: Sequence[Measurement]) -> tuple[Measurement, Measurement]:
    plain, dosed = (next(one for one in group if one.strength == strength) for strength in (0, 1))
    return plain, dosed


def _by_tone(measured: Sequence[Measurement]) -> list[tuple[str, list[Measurement]]]:
    return [(tone, list(group)) for tone, group in groupby(measured, key=lambda one: one.tone)]


def _telling(plain: Measurement, dosed: Measurement) -> int:
    """The prompt to show: of those that were turned, the one whose completion the unsteered model finds most usual."""
    from .measure import tone_of

    pairs = list(zip(plain.completions, dosed.completions, strict=True))
    turned = [tone_of(after) == dosed.tone != tone_of(before) for before, after in pairs]
    return min(range(len(pairs)), key=lambda i: (not turned[i], dosed.perplexities[i]))


def _short(path: Path) -> str:
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative
