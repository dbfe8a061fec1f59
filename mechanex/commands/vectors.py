"""``mechanex vectors``: the steering vectors that are stored on this machine."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from ..engine.formats.files import format_of
from ..engine.formats.site import Site
from ..engine.vector_store import VectorStore
from ..engine.vectors import SteeringVector
from ..errors import MechanexError, ValidationError
from ..home import vectors_folder
from .console import console, echo_json, model_text
from .text_files import lines_in

__all__ = ["find_vector", "run_condition", "run_delete", "run_export", "run_import", "run_list", "run_show"]

_logger = logging.getLogger(__name__)


def run_list(as_json: bool) -> None:
    """Prints the stored vectors, the newest first; a file that can't be read is left out with a warning."""
    found = []
    for path in sorted(vectors_folder().glob("*.safetensors"), key=lambda path: -path.stat().st_mtime):
        try:
            found.append(_described(path.stem, SteeringVector.load(path), path))
        except (MechanexError, OSError) as error:
            _logger.warning("%s is left out: %s", path, error)
    if as_json:
        echo_json(found)
        return
    if not found:
        click.echo(f"There are no vectors in {vectors_folder()}.")
        return
    table = Table()
    columns = ("id", "model", "method", "layers", "width", "stored")
    for column in columns:
        # An id that is broken over lines can't be copied.
        table.add_column(column, overflow="fold", no_wrap=column == "id")
    for one in found:
        table.add_row(*(model_text(_shown(one[column])) for column in columns))
    console().print(table)


def run_show(vector: str, as_json: bool, site: Site | None = None) -> None:
    """Prints all that is known of a vector.

    Raises:
        MechanexError: there is none with this id or path, or its file is damaged.
    """
    one = _described(vector, find_vector(vector, site))
    if as_json:
        echo_json(one)
        return
    table = Table.grid(padding=(0, 2))
    for name, value in one.items():
        table.add_row(model_text(name, "bold"), model_text(_shown(value)))
    console().print(table)


def run_export(vector: str, path: Path, site: Site | None = None) -> None:
    """Writes a vector to a file in the format of its suffix.

    Raises:
        MechanexError: no such vector, or one that the format can't hold.
    """
    find_vector(vector, site).save(path)
    click.echo(f"Written to {path}.")


def run_condition(
    vector: str,
    path: Path,
    *,
    model: str,
    prompts: Path,
    others: Path,
    layers: Sequence[int],
    false_positives: float,
    as_json: bool,
) -> None:
    """Fits the condition that a file's prompts meet, writes the vector with it, and prints what was found.

    Raises:
        MechanexError: no such vector, too few prompts, or ones that the model can't tell apart.
    """
    from ..engine.conditions.fitting import fit_condition
    from ..engine.models.resolve import load

    format_of(path)
    found = find_vector(vector)
    own, left = (list(lines_in(one).values()) for one in (prompts, others))
    loaded = load(model, backend="transformers")
    condition = fit_condition(
        loaded.model,
        own,
        left,
        list(layers) or None,
        loaded.tokenizer,
        false_positives=false_positives,
    )
    found.when(condition).save(path)
    report = {
        "path": str(path),
        "layer": condition.layer,
        "threshold": condition.threshold,
        "true_positives": condition.true_positives,
        "false_positives": condition.false_positives,
    }
    if as_json:
        echo_json(report)
        return
    click.echo(
        f"Written to {path}: layer {condition.layer}, threshold {condition.threshold:.4g}; of held-out prompts "
        f"{condition.true_positives:.1%} meet it, of others {condition.false_positives:.1%}."
    )


def run_import(path: Path, as_json: bool, site: Site | None = None) -> None:
    """Stores a file's vector under a new id, which it prints alone on stdout.

    Raises:
        MechanexError: not a sound vector file, or the folder of stored vectors can't be written.
    """
    vector_id = VectorStore().put(SteeringVector.load(path, site=site))
    if not (vectors_folder() / f"{vector_id}.safetensors").exists():
        raise MechanexError(f"{vectors_folder()} can't be written: set MECHANEX_HOME to a folder that can.")
    if as_json:
        echo_json({"id": vector_id})
    else:
        click.echo(vector_id)


def run_delete(vector_ids: Sequence[str]) -> None:
    """Deletes stored vectors: all of those that are named, or none.

    Raises:
        MechanexError: there is none with one of the ids, or its file can't be deleted.
    """
    store = VectorStore()
    vector_ids = [store.completed(one) for one in vector_ids]
    unknown = [one for one in vector_ids if one not in store]
    for vector_id in unknown or dict.fromkeys(vector_ids):  # the first unknown one raises
        store.delete(vector_id)
        click.echo(f"Deleted {vector_id}.")


def find_vector(vector: str, site: Site | None = None) -> SteeringVector:
    """The vector that a user means by a stored vector's id or a file's path.

    Args:
        vector: the id, what only one id begins with, or a path.
        site: what the layers of a file mean, as in ``SteeringVector.load``; for files alone.

    Raises:
        MechanexError: there is none, or its file is damaged.
    """
    store = VectorStore()
    if not Path(vector).exists():
        vector = store.completed(vector)
    is_file = vector not in store and (Path(vector).suffix or os.sep in vector)
    if is_file:
        return SteeringVector.load(vector, site=site)
    if site is not None:
        raise ValidationError(f"--site is for files, and {vector!r} is a stored vector: leave it out.")
    return store.get(vector)


def _described(name: str, vector: SteeringVector, path: Path | None = None) -> dict[str, Any]:
    one: dict[str, Any] = {
        "id": name,
        "model": vector.model,
        "model_family": vector.model_family,
        "method": vector.method,
        "layers": list(vector.layers),
        "width": vector.width,
        "norms": [round(norm, 6) for norm in vector.norms().values()],
        "site": vector.site,
        "seed": vector.seed,
        "library_version": vector.library_version,
        "metadata": dict(vector.metadata),
    }
    if vector.terms:
        one["terms"] = json.loads(vector.terms.text())
    if path is not None:
        stored = datetime.fromtimestamp(path.stat().st_mtime, timezone.utc)
        one["stored"] = stored.isoformat(timespec="seconds")
    return one


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, dict):
        return ", ".join(f"{name}: {text}" for name, text in value.items())
    return "" if value is None else str(value)
