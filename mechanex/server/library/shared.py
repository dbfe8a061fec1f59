"""Behaviors that the operator of a server has made from examples, for every client."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ...bundled import data_path
from ...engine.caa import caa_vectors
from ...engine.datasets import read_pairs
from ...engine.models.adapter import ModelAdapter
from ...engine.sae.store import BEHAVIOR_FILE
from ...engine.vectors import SteeringVector
from ...errors import ValidationError

__all__ = ["make_behaviors"]


def make_behaviors(adapter: ModelAdapter, sources: Sequence[Path]) -> dict[str, SteeringVector]:
    """The vectors of behaviors from contrastive examples, by name: the file's without suffix, or a bundled set's.

    Each gets the vector that ``steering.generate_vectors`` computes from all of its examples.

    Args:
        adapter: the model, nobody else's meanwhile.
        sources: JSONL files, or names of bundled sets such as ``calm_angry``; files of behaviors with detectors have
            no vectors.

    Raises:
        NotFoundError: no such file or set.
        ValidationError: a bad line, or two sources of one name.
    """
    found: dict[str, SteeringVector | None] = {}
    for source in sources:
        if source.stem in found:
            raise ValidationError(f"two behaviors are called {source.stem}: rename a file.")
        if source.suffix == BEHAVIOR_FILE:
            found[source.stem] = None
            continue
        pairs = read_pairs(source if source.is_file() or source.suffix else data_path(source.name))
        found[source.stem] = caa_vectors(
            adapter, pairs.prompts, pairs.positive_answers, pairs.negative_answers
        )
    return {name: vector for name, vector in found.items() if vector is not None}
