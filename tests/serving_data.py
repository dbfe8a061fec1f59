"""Vectors of the bundled examples, for tests of the server."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mechanex.bundled import data_path
from mechanex.engine.caa import caa_vectors
from mechanex.engine.datasets import read_pairs
from mechanex.engine.vectors import SteeringVector

__all__ = ["NAMES", "tone_vectors"]

NAMES = ("calm_angry", "kind_rude", "hopeful_gloomy", "true_false")


def tone_vectors(
    model: Any, tokenizer: Any, folder: Path, names: Sequence[str] = NAMES
) -> dict[str, SteeringVector]:
    """One vector per bundled set, also saved as ``folder/NAME.safetensors``."""
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, SteeringVector] = {}
    for name in names:
        pairs = read_pairs(data_path(name))
        found[name] = caa_vectors(
            model, pairs.prompts, pairs.positive_answers, pairs.negative_answers, None, tokenizer
        )
        found[name].save(folder / f"{name}.safetensors")
    return found
