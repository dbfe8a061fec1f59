"""Which autoencoder a model's name stands for: a list that comes with the package, and one of the user's in front."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...bundled import sae_path, saes_file
from ...errors import NotFoundError, ValidationError
from ...home import atomic_path, mechanex_home
from .autoencoder import SparseAutoencoder
from .files import read_json
from .hook_points import hook_point
from .read import read_sae

__all__ = ["Entry", "add", "default_sae", "entries", "find", "for_model", "load", "user_file"]

BUNDLED = "bundled:"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """An autoencoder that is known by name.

    Args:
        name: what ``load`` takes.
        models: names of the models that it is for, the first entry of a model being its default.
        source: as ``read_sae`` takes it, or ``bundled:<name>``.
        point: where it reads; None: as its files say.
        note: one line for people.
    """

    name: str
    models: tuple[str, ...]
    source: str
    point: str | None = None
    note: str = ""


def user_file() -> Path:
    """The user's list, ``<home>/saes.json``; it need not be there."""
    return mechanex_home() / "saes.json"


def entries() -> list[Entry]:
    """All that are known, the user's first.

    Raises:
        ValidationError: the user's file isn't as it should be; says how.
    """
    found: dict[str, Entry] = {}
    for path in (user_file(), saes_file()):
        if path.exists():
            for name, told in read_json(path).items():
                found.setdefault(name, _entry(name, told, path))
    return list(found.values())


def find(model: str) -> Entry:
    """The default one of a model.

    Args:
        model: a name or path; case, an organisation in front and what a path has before its last part don't count.

    Raises:
        NotFoundError: none is known; lists the models that have one.
    """
    wanted = _short(model)
    for entry in entries():
        if wanted in map(_short, entry.models):
            return entry
    known = sorted({model for entry in entries() for model in entry.models})
    raise NotFoundError(
        f"no sparse autoencoder is known for {model!r}. Known are those for {', '.join(known)}. Give one by folder or "
        f"Hub name, train one with `mechanex sae train`, or add it to {user_file()}."
    )


def load(name: str) -> SparseAutoencoder:
    """Reads the autoencoder of this name in the list, or else from this folder or Hub name.

    Raises:
        NotFoundError, ValidationError: as in ``read_sae``.
    """
    entry = next((one for one in entries() if one.name == name), None)
    return read_sae(name) if entry is None else _read(entry)


def default_sae(model: str) -> SparseAutoencoder:
    """Reads the default autoencoder of a model; errors as in ``find`` and ``read_sae``."""
    return _read(find(model))


def for_model(model: str) -> tuple[str, SparseAutoencoder] | None:
    """The default autoencoder of a model, by its name in the list and read; None, and a warning, where there is none.

    Raises:
        ValidationError: as in ``read_sae``.
    """
    try:
        entry = find(model)
        return entry.name, _read(entry)
    except NotFoundError as error:
        _log.warning("the difference of means watches alone: %s", error.message)
        return None


def _read(entry: Entry) -> SparseAutoencoder:
    source: str | Path = entry.source
    if entry.source.startswith(BUNDLED):
        source = sae_path(entry.source.removeprefix(BUNDLED))
    return read_sae(source, point=entry.point)


def add(entry: Entry) -> None:
    """Puts an entry into the user's list, in front of those that are for the same models; one of its name goes.

    Raises:
        ValidationError: the list isn't readable, or the entry is none.
    """
    told = {name: value for name, value in vars(entry).items() if name != "name" and value}
    _entry(entry.name, told, user_file())
    before = read_json(user_file()) if user_file().exists() else {}
    before.pop(entry.name, None)
    with atomic_path(user_file()) as temporary:
        temporary.write_text(
            json.dumps({entry.name: {**told, "models": list(entry.models)}, **before}, indent=2) + "\n"
        )


def _entry(name: str, told: Any, path: Path) -> Entry:
    if not isinstance(told, Mapping):
        raise ValidationError(f"{name!r} in {path} is {told!r:.60}, and an object is expected.")
    unknown = sorted(set(told) - {"models", "source", "point", "note"})
    models, source = told.get("models"), told.get("source")
    if unknown or not isinstance(source, str) or not source:
        raise ValidationError(
            f"{name!r} in {path} needs 'source', a folder or a Hub name with the folder in it, and may have 'models', "
            f"'point' and 'note'{f'; it has {unknown}' if unknown else ''}."
        )
    if not isinstance(models, list | tuple) or not all(isinstance(one, str) and one for one in models):
        raise ValidationError(f"models of {name!r} in {path} is a list of names; got {models!r:.60}.")
    point = told.get("point")
    if point is not None:
        hook_point(point)
    return Entry(name, tuple(models), source, point, str(told.get("note", "")))


def _short(model: str) -> str:
    return model.rstrip("/").replace("\\", "/").rpartition("/")[2].lower()
