"""What ``mechanex measure`` and ``mechanex sweep`` do."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from ..bundled import dataset_path
from ..engine.datasets import prompt_of, read_lines, read_pairs
from ..engine.doses.ability import read_questions
from ..engine.doses.dose import EDITS, check_kind
from ..engine.doses.dose_report import DoseReport
from ..engine.doses.measure import measure
from ..engine.doses.scorers import TextScorer, classifier, word_share
from ..engine.doses.sweep import STRENGTHS, sweep
from ..engine.doses.swept import Swept
from ..engine.doses.tune import tuned
from ..engine.figures import check_figure
from ..engine.methods import check_method
from ..engine.models.resolve import load
from ..engine.terms import TOKENS, check_token_kind
from ..engine.vectors import SteeringVector
from ..errors import ValidationError
from .console import console, echo_json, model_text
from .once import once
from .text_files import text_in
from .vectors import find_vector

__all__ = ["run_measure", "run_sweep"]

_TEXTS = 3  # that are printed side by side


def run_measure(
    *,
    model: str,
    vector: str,
    strength: float,
    data: str | None,
    split: str | None,
    prompts: Path | None,
    most: int,
    words: Path | None,
    against: Path | None,
    questions: Path | None,
    max_tokens: int,
    seed: int,
    out: Path | None,
    device: str | None,
    dtype: str | None,
    as_json: bool,
) -> None:
    """Measures a vector, and prints the figures and a few texts side by side.

    Raises:
        MechanexError: whatever the engine finds wrong with the model, the vector, the data or the lists.
    """
    found = find_vector(vector)
    pairs = None if data is None else read_pairs(dataset_path(data), split=split)
    asked = pairs.prompts if pairs is not None else []
    if prompts is not None:
        asked = read_lines(prompts, prompt_of, None)
    judges: dict[str, TextScorer] = {}
    if words is not None:
        judges[words.stem] = _by_words(words, against)
    if pairs is not None:
        judges["naive Bayes"] = classifier(pairs.positive_answers, pairs.negative_answers)
    choices = None if questions is None else read_questions(questions)
    if out is not None:
        check_figure(out / "report.png")
    loaded = load(model, backend="transformers", device=device, dtype=dtype)
    report = measure(
        loaded.model,
        found,
        asked[:most],
        judges,
        strength=strength,
        questions=choices,
        tokenizer=loaded.tokenizer,
        max_tokens=max_tokens,
        seed=seed,
    )
    if out is not None:
        once(partial(_write_report, report, out))
    if as_json:
        echo_json(report.as_dict())
        return
    screen = console()
    screen.print(f"{report.model}: {report.steering}", markup=False, soft_wrap=True)
    if report.weights:
        screen.print(f"weights {report.weights}", markup=False, soft_wrap=True)
    table = Table(title=f"{report.prompts} prompts, 95 % intervals")
    table.add_column("")
    for heading in ("plain", "steered", "change"):
        table.add_column(heading, justify="right")
    for row in report.rows():
        table.add_row(*row)
    screen.print(table)
    texts = Table(show_lines=True)
    for column in ("prompt", "plain", "steered"):
        texts.add_column(column, ratio=1, overflow="fold")
    for one in report.texts[:_TEXTS]:
        texts.add_row(model_text(one.prompt), model_text(one.plain.strip()), model_text(one.steered.strip()))
    screen.print(texts)
    if out is not None:
        click.echo(f"report: {out / 'report.html'}")


def run_sweep(
    *,
    model: str,
    data: str,
    split: str | None,
    layers: Sequence[int],
    strengths: Sequence[float],
    edits: Sequence[str],
    tokens: Sequence[str],
    methods: Sequence[str],
    widths: Sequence[int],
    words: Path | None,
    against: Path | None,
    validation: Path | None,
    test: Path | None,
    out: Path,
    resume: bool,
    force: bool,
    seed: int,
    device: str | None,
    dtype: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Sweeps, prints the table and the recommendation, and writes the tuned vector with all results to ``out``.

    Args:
        options: passed on to ``sweep``.

    Raises:
        MechanexError: whatever the engine finds wrong with the model, the data, the names or the checkpoint.
    """
    for names, check in ((edits, check_kind), (tokens, check_token_kind), (methods, check_method)):
        for name in names:
            check(name)
    pairs = read_pairs(dataset_path(data), split=split)
    checkpoint = out / "checkpoint.json"
    begun = once(checkpoint.exists)
    if resume and not begun:
        raise ValidationError(f"there is nothing to resume: {checkpoint} does not exist; leave --resume out.")
    if begun and not resume and not force:
        raise ValidationError(
            f"{out} holds a sweep: --resume goes on with it, --force starts anew in its place, and another --out "
            "keeps it."
        )
    check_figure(out / "sweep.png")
    asked = [None if path is None else read_lines(path, prompt_of, None) for path in (validation, test)]
    loaded = load(model, backend="transformers", device=device, dtype=dtype)
    out.mkdir(parents=True, exist_ok=True)
    if force:
        once(lambda: checkpoint.unlink(missing_ok=True))
    found = sweep(
        loaded.model,
        pairs,
        layers=list(layers) or None,
        strengths=list(strengths) or STRENGTHS,
        edits=list(edits) or tuple(EDITS),
        tokens=list(tokens) or tuple(TOKENS),
        methods=list(methods) or ("caa",),
        widths=list(widths) or None,
        scorer=None if words is None else _by_words(words, against),
        validation=asked[0],
        test=asked[1],
        tokenizer=loaded.tokenizer,
        seed=seed,
        checkpoint=checkpoint,
        progress=sys.stderr.isatty(),
        **options,
    )
    vector = tuned(loaded.model, found, tokenizer=loaded.tokenizer, seed=seed)
    once(partial(_write_swept, vector, found, out))
    if as_json:
        echo_json({**found.as_dict(), "vector": str(out / "vector.safetensors")})
        return
    screen = console()
    screen.print(
        f"{found.model}: {len(found.settings)} settings for {found.evaluations:.1f} whole evaluations",
        markup=False,
        soft_wrap=True,
    )
    screen.print(found.table(), markup=False, soft_wrap=True)
    screen.print(found.sentence, markup=False, soft_wrap=True)
    if found.confirmed is not None:
        held = ", ".join(f"{name} {one}" for name, one in found.confirmed.items())
        screen.print(f"on held-out prompts: {held}", markup=False, soft_wrap=True)
    click.echo(f"vector: {out / 'vector.safetensors'} (strength 1 is this dose)")


def _write_report(report: DoseReport, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    report.save(out / "report.json")
    report.html(out / "report.html")
    report.plot(out / "report.png")


def _write_swept(vector: SteeringVector, found: Swept, out: Path) -> None:
    vector.save(out / "vector.safetensors")
    found.save(out / "sweep.json")
    found.plot(out / "sweep.png")


def _by_words(words: Path, against: Path | None) -> TextScorer:
    listed = [text_in(path).split() for path in (words, against) if path is not None]
    if not all(listed):
        raise ValidationError(f"{words} or {against} holds no words: one a line is expected.")
    return word_share(*listed)
