"""The report of a measurement: as JSON, as a table, as a page and as a picture."""

from __future__ import annotations

import html
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...home import atomic_path
from ..figures import BLUE, RED, figure_to
from .intervals import Interval
from .swept import finite

__all__ = ["Change", "DoseReport", "KLFigures", "SideBySide"]

_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em}"
    "body{color:#1a1a1a;background:#fff}"
    "table{border-collapse:collapse;margin:1em 0}td,th{padding:3px 12px;text-align:left;vertical-align:top;"
    "border-bottom:1px solid #ddd}td.n{text-align:right;font-variant-numeric:tabular-nums}.s{color:#555;font-size:13px}"
    "td.t{white-space:pre-wrap;width:33%}"
)


@dataclass(frozen=True)
class Change:
    """A figure without and with steering; ``change`` is the difference, of perplexity the ratio."""

    plain: Interval
    steered: Interval
    change: Interval


@dataclass(frozen=True)
class KLFigures:
    """KL(steered‖plain) in nats over the tokens of the plain model's answers.

    Args:
        p50, p95: quantiles.
        by_position: the median at the first, second, … token of the answers.
        tokens: how many there were.
    """

    p50: Interval
    p95: Interval
    by_position: list[float]
    tokens: int


@dataclass(frozen=True)
class SideBySide:
    """A prompt with both answers."""

    prompt: str
    plain: str
    steered: str


@dataclass(frozen=True)
class DoseReport:
    """What a dose does and costs.

    Args:
        model: its id.
        weights: the hash of its weights where it is known.
        steering: what was measured, in words.
        prompts: how many.
        max_tokens, seed: of the answers.
        effects: by scorer.
        perplexity: of the answers under the plain model; ``change`` is the ratio.
        repetition: share of runs of four tokens that came before in the answer.
        kl: None where the plain model wrote nothing.
        ability: share of multiple-choice questions that are answered right; None where it wasn't measured.
        brittleness: by variant of the prompts and scorer, the effect there.
        texts: side by side.
    """

    model: str
    weights: str | None
    steering: str
    prompts: int
    max_tokens: int
    seed: int
    effects: dict[str, Change]
    perplexity: Change
    repetition: Change
    kl: KLFigures | None
    ability: Change | None
    brittleness: dict[str, dict[str, Interval]]
    texts: list[SideBySide]

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON; what isn't finite is None."""
        found: dict[str, Any] = finite(asdict(self))
        return found

    def rows(self) -> Iterator[tuple[str, str, str, str]]:
        """Lines of the table: what, plain, steered, change."""
        for name, one in self.effects.items():
            yield f"effect: {name}", *_parts(one)
        yield "perplexity (change: ratio)", *_parts(self.perplexity)
        yield "repetition", *_parts(self.repetition)
        if self.kl is not None:
            yield "KL per token, p50 (nats)", "", "", str(self.kl.p50)
            yield "KL per token, p95 (nats)", "", "", str(self.kl.p95)
        if self.ability is not None:
            yield "ability", *_parts(self.ability)
        for variant, effects in self.brittleness.items():
            for name, effect in effects.items():
                yield f"effect: {name}, {variant}", "", "", str(effect)

    def table(self) -> str:
        """The figures as lines of text."""
        lines = [f"{self.model}: {self.steering} ({self.prompts} prompts, 95 % intervals)"]
        if self.weights:
            lines.append(f"weights {self.weights}")
        lines.append(f"{'':34} {'plain':>22} {'steered':>22} {'change':>22}")
        lines += [f"{what:34} {a:>22} {b:>22} {c:>22}" for what, a, b, c in self.rows()]
        return "\n".join(lines)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes everything as JSON."""
        with atomic_path(Path(path)) as temporary:
            told = json.dumps(self.as_dict(), indent=1, ensure_ascii=False)
            Path(temporary).write_text(told + "\n", encoding="utf-8", errors="replace")

    def html(self, path: str | os.PathLike[str]) -> None:
        """Writes a page with the figures and the texts side by side; it needs no script and no network."""
        figures = "".join(
            f"<tr><td>{_text(what)}</td>"
            + "".join(f'<td class="n">{_text(value)}</td>' for value in values)
            + "</tr>"
            for what, *values in self.rows()
        )
        texts = "".join(
            f'<tr><td class="t">{_text(one.prompt)}</td><td class="t">{_text(one.plain)}</td>'
            f'<td class="t">{_text(one.steered)}</td></tr>'
            for one in self.texts
        )
        weights = f", weights {_text(self.weights)}" if self.weights else ""
        page = (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            f"<title>{_text(self.model)}: steering</title>"
            f"<style>{_STYLE}</style></head><body><h1>{_text(self.model)}</h1><p>{_text(self.steering)}</p>"
            f"<table><tr><th></th><th>plain</th><th>steered</th><th>change</th></tr>{figures}</table>"
            f'<p class="s">{self.prompts} prompts, answers of up to {self.max_tokens} tokens, seed {self.seed}'
            f"{weights}. "
            "Intervals hold 95 % of bootstrap resamples of the prompts.</p>"
            f"<table><tr><th>prompt</th><th>plain</th><th>steered</th></tr>{texts}</table></body></html>\n"
        )
        with atomic_path(Path(path)) as temporary:
            Path(temporary).write_text(page, encoding="utf-8", errors="replace")

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draws the effects with their intervals, and KL by position, to a .png, .svg or .pdf file.

        Raises:
            ValidationError: another ending, or matplotlib isn't installed.
        """
        with figure_to(path, 8, 3.4) as figure:
            left, right = figure.subplots(1, 2)
            bars = [(name, one.change) for name, one in self.effects.items()]
            bars += [
                (f"{name}, {variant}", one)
                for variant, found in self.brittleness.items()
                for name, one in found.items()
            ]
            for i, (_, one) in enumerate(bars):
                left.plot([one.low, one.high], [i, i], color=BLUE, linewidth=2)
                left.plot([one.value], [i], "o", color=RED)
            left.axvline(0, color="#bbbbbb", linewidth=0.8)
            left.set_yticks(range(len(bars)), [name for name, _ in bars])
            left.invert_yaxis()
            left.set(xlabel="effect")
            if self.kl is not None:
                right.plot(range(1, len(self.kl.by_position) + 1), self.kl.by_position, color=BLUE)
            right.set(xlabel="token of the answer", ylabel="median KL (nats)", ylim=(0, None))
            for axes in (left, right):
                axes.spines[["top", "right"]].set_visible(False)


def _parts(change: Change) -> tuple[str, str, str]:
    return str(change.plain), str(change.steered), str(change.change)


def _text(text: str) -> str:
    return html.escape("".join(char if char.isprintable() or char in "\n\t" else "\ufffd" for char in text))
