"""The demo's tables, examples and plot."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from ..commands.console import console, model_text
from ..extras import install_line

if TYPE_CHECKING:
    from .measure import Measurement, Steering

__all__ = ["print_report", "save_plot"]

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
        title="completions of the tone", xlabel="strength", ylabel="% of held-out prompts", ylim=(-3, 103)
    )
    right.set(title="perplexity under the unsteered model", xlabel="strength", ylabel="per token")
    right.set_ylim(bottom=0)
    left.legend(title="steered towards", frameon=False)
    for axes in (left, right):
        axes.axvline(0, color="#999999", linewidth=0.8, linestyle=":")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path


def print_report(
    measured: Sequence[Measurement],
    chosen: Sequence[Steering],
    prompts: Mapping[str, Sequence[str]],
    plot: Path | None,
    figures: Path,
    seconds: float,
) -> None:
    """Prints how each tone is steered, figures per strength, an example of each, and the conclusion."""
    screen = console()
    screen.print("Steered at the layer and by the unit that served best on other prompts, for each tone:")
    for steering in chosen:
        screen.print(
            f"  {steering.tone}: layer {steering.layer}, strength 1 adds {steering.unit:g} times the mean "
            f"difference, whose norm is {steering.norm:.3g}",
            markup=False,
        )
    table = Table(title="mx-tiny on prompts that gave neither vectors nor settings")
    table.add_column("steered towards")
    for heading in (
        "strength",
        "completions of the tone",
        "tone words per 100",
        "perplexity (unsteered model)",
    ):
        table.add_column(heading, justify="right")
    examples = Table(title="the same prompt and seed at strength 0 and 2", show_lines=True)
    for heading in ("tone", "prompt", "unsteered", "steered"):
        examples.add_column(heading, overflow="fold")
    conclusions = []
    for tone, group in _by_tone(measured):
        for one in group:
            table.add_row(
                tone if one is group[0] else "",
                f"{one.strength:+g}" if one.strength else "0",
                f"{one.share:.0%}",
                f"{one.words:.1f}",
                f"{one.perplexity:.2f}",
                end_section=one is group[-1],
            )
        plain = next(one for one in group if one.strength == 0)
        most = group[-1]
        shown = _telling(plain, most)
        examples.add_row(
            tone,
            model_text(prompts[tone][shown]),
            model_text(plain.completions[shown]),
            model_text(most.completions[shown]),
        )
        conclusions.append(
            f"{tone}: {plain.share:.0%} of the completions unsteered, {most.share:.0%} at strength "
            f"{most.strength:g}; perplexity {most.perplexity / plain.perplexity:.2f} times the unsteered one"
        )
    screen.print(table)
    screen.print(examples)
    for line in conclusions:
        screen.print(line, markup=False)
    screen.print(f"figures: {_short(figures)}", markup=False)
    missing = f"plot: none, matplotlib is missing; {install_line('plot')}, and run the demo again"
    screen.print(missing if plot is None else f"plot: {_short(plot)}", markup=False)
    screen.print(f"{seconds:.0f} s", markup=False)


def _by_tone(measured: Sequence[Measurement]) -> list[tuple[str, list[Measurement]]]:
    return [(tone, list(group)) for tone, group in groupby(measured, key=lambda one: one.tone)]


def _telling(plain: Measurement, most: Measurement) -> int:
    """The prompt whose completion won the most words of the tone."""
    from .measure import count_words

    pairs = zip(plain.completions, most.completions, strict=True)
    won = [count_words(after, most.tone) - count_words(before, most.tone) for before, after in pairs]
    return won.index(max(won))


def _short(path: Path) -> str:
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative
