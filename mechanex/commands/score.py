"""``mechanex score``: how likely completions are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click
from rich.table import Table

from ..engine.models.resolve import load
from ..engine.score import completion_logprobs
from .chats import given_prompts
from .console import console, echo_json, exp, model_text
from .vectors import find_vector

__all__ = ["run_score"]


def run_score(
    *,
    model: str,
    prompt: str | None,
    chats: Sequence[Path],
    continue_final_message: bool,
    completions: Sequence[str],
    vector: str | None,
    strength: float,
    coldness: float,
    device: str | None,
    dtype: str | None,
    as_json: bool,
) -> None:
    """Prints each completion's natural log-probability, in the given order.

    Raises:
        MechanexError: whatever the engine finds wrong with the model, the texts or the vector.
    """
    asked = given_prompts([] if prompt is None else [prompt], chats, continue_final_message)
    if len(asked) > 1:
        raise click.UsageError("--prompt and --chat give one prompt: leave the others out.")
    steering = None if vector is None else find_vector(vector) * strength
    loaded = load(model, backend="transformers", device=device, dtype=dtype)
    found = completion_logprobs(
        loaded.model, asked[0], list(completions), loaded.tokenizer, coldness=coldness, edits=steering
    )
    rows = [
        {
            "completion": text,
            "logprob": float(logprob),
            "tokens": len(tokens),
            "perplexity": exp(-float(logprob) / len(tokens)),
        }
        for text, logprob, tokens in zip(completions, found.sums, found.tokens, strict=True)
    ]
    if as_json:
        echo_json({"model": loaded.name, "prompt": str(chats[0]) if chats else prompt, "completions": rows})
        return
    table = Table()
    table.add_column("completion", overflow="fold")
    for column in ("logprob", "tokens", "perplexity"):
        table.add_column(column, justify="right")
    for row in rows:
        numbers = (f"{row['logprob']:.4f}", str(row["tokens"]), f"{row['perplexity']:.4g}")
        table.add_row(model_text(str(row["completion"])), *numbers)
    console().print(table)
