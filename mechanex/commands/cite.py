"""``mechanex cite``: which sentences of files an answer rests on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click
from rich.table import Table

from ..engine.models.resolve import load
from ..engine.raag.cite import cite
from ..engine.raag.documents import question_text
from .console import console, echo_json, model_text
from .text_files import text_in

__all__ = ["run_cite"]

_SHOWN = 3


def run_cite(
    *,
    files: Sequence[Path],
    question: str,
    answer: str | None,
    model: str,
    max_tokens: int,
    seed: int | None,
    device: str | None,
    dtype: str | None,
    as_json: bool,
) -> None:
    """Prints the answer's sentences, and under each what it rests on, best first.

    Raises:
        MechanexError: whatever the engine finds wrong with the model or the texts.
    """
    sources = [{"id": str(file), "text": text_in(file)} for file in files]
    loaded = load(model, backend="transformers", device=device, dtype=dtype)
    found = cite(
        loaded.model,
        loaded.tokenizer,
        question_text(question),
        answer,
        sources,
        question=question,
        max_tokens=max_tokens,
        seed=seed or 0,
    )
    if as_json:
        echo_json({"model": loaded.name, "question": question, **found})
        return
    if found["retrieval"]["left_out"]:
        click.echo(
            f"{len(found['retrieval']['left_out'])} sentences were left out: BM25 ranks them below the others, and not "
            "all fit into the model's context.",
            err=True,
        )
    table = Table()
    table.add_column("answer", overflow="fold")
    table.add_column("rests on", overflow="fold")
    table.add_column("source", overflow="fold")
    table.add_column("nats", justify="right")
    for sentence in found["sentences"]:
        shown = model_text(sentence["text"])
        for one in sentence["citations"][:_SHOWN] or [None]:
            if one is None:
                table.add_row(shown, "nothing", "", "")
            else:
                mark = "*" if one["validated"] else ""
                table.add_row(
                    shown, model_text(one["text"]), model_text(one["source"]), f"{one['score']:.3f}{mark}"
                )
            shown = model_text("")
    console().print(table)
    console().print("* more than in any of the shuffled sources")
