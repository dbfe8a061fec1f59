"""``mechanex steer``: the same prompts with and without a vector."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from ..bundled import dataset_path
from ..engine.datasets import read_pairs
from ..engine.formats.files import format_of
from ..engine.generate import generate_batch
from ..engine.methods import recorded_vectors
from ..engine.models.resolve import LoadedModel, load
from ..engine.sampling import Options
from ..engine.text import Prompt, prompt_text
from ..engine.vectors import SteeringVector
from .chats import given_prompts
from .console import console, echo_json, model_text
from .vectors import find_vector

__all__ = ["run_steer"]


def run_steer(
    *,
    model: str,
    prompts: Sequence[str],
    chats: Sequence[Path],
    continue_final_message: bool,
    data: str | None,
    split: str | None,
    vector: str | None,
    layers: Sequence[int],
    method: str,
    strength: float,
    guard: float | None,
    save: Path | None,
    max_tokens: int,
    decoding: dict[str, Any],
    seed: int,
    device: str | None,
    dtype: str | None,
    as_json: bool,
) -> None:
    """Computes or reads the vector, generates both ways with the same seeds, and prints a table or JSON.

    Raises:
        MechanexError: whatever the engine finds wrong with the model, the data, the vector or the settings.
    """
    # Checked before the model is loaded, which may take minutes.
    asked = given_prompts(prompts, chats, continue_final_message)
    if save is not None:
        format_of(save)
    settings = decoding | {"max_tokens": max_tokens, "seed": seed}
    Options(**settings, guard=guard)
    found = None if vector is None else find_vector(vector)
    pairs = None if data is None else read_pairs(dataset_path(data), split=split)
    loaded = load(model, backend="transformers", device=device, dtype=dtype)
    if pairs is not None:
        found = recorded_vectors(
            loaded.model,
            (pairs.prompts, pairs.positive_answers, pairs.negative_answers),
            list(layers) or None,
            method,
            loaded.tokenizer,
            name=os.path.basename(dataset_path(data or "")),
            split=split,
            progress=sys.stderr.isatty(),
        )
    assert found is not None
    if save is not None:
        found.save(save)
    unsteered = _continue(loaded, asked, settings)
    steered = _continue(loaded, asked, settings, found, strength, guard)
    shown = [*prompts, *(str(path) for path in chats)]
    origin = f"{method} from {len(pairs)} pairs" if pairs is not None else vector
    if as_json:
        rows = [
            {"prompt": prompt, "unsteered": before, "steered": after}
            for prompt, before, after in zip(shown, unsteered, steered, strict=True)
        ]
        report = {
            "model": loaded.name,
            "vector": origin,
            "layers": list(found.layers),
            "norms": list(found.norms().values()),
            "strength": strength,
            "guard": guard,
            "seed": seed,
            "results": rows,
        }
        echo_json(report)
        return
    norms = ", ".join(f"layer {layer} (norm {norm:.3g})" for layer, norm in found.norms().items())
    screen = console()
    heading = f"{loaded.name}: {origin}, {norms}, strength {strength:g}, seed {seed}"
    screen.print(heading, markup=False, soft_wrap=True)
    table = Table(show_lines=True)
    for column in ("prompt", "unsteered", "steered"):
        table.add_column(column, ratio=1, overflow="fold")
    for row in zip(shown, unsteered, steered, strict=True):
        table.add_row(*map(model_text, row))
    screen.print(table)


def _continue(
    loaded: LoadedModel,
    prompts: Sequence[Prompt],
    settings: dict[str, Any],
    vector: SteeringVector | None = None,
    strength: float = 1.0,
    guard: float | None = None,
) -> list[str]:
    texts = generate_batch(
        loaded.model,
        loaded.tokenizer,
        list(prompts),
        **settings,
        vector=vector,
        strength=strength,
        guard=guard,
    )
    written = [prompt_text(loaded.tokenizer, prompt) for prompt in prompts]
    return [text[len(prompt) :].strip() for text, prompt in zip(texts, written, strict=True)]
