"""The small model, the datasets and the word lists that come with the package."""

from __future__ import annotations

import json
from pathlib import Path

from ..errors import NotFoundError

_HERE = Path(__file__).resolve().parent


def model_names() -> list[str]:
    """Returns the names of the bundled models."""
    return sorted(path.parent.name for path in _HERE.glob("*/config.json"))


def model_path(name: str) -> Path:
    """Returns the folder of a bundled model, as `from_pretrained` takes it.

    Raises:
        NotFoundError: no model of that name is bundled.
    """
    if name not in model_names():
        raise NotFoundError(f"no bundled model {name!r}; there is: {', '.join(model_names()) or 'none'}")
    return _HERE / name


def dataset_names() -> list[str]:
    """Returns the names of the bundled datasets."""
    return sorted(path.stem for path in (_HERE / "data").glob("*.jsonl"))


def data_path(name: str) -> Path:
    """Returns the file of a bundled dataset, such as "calm_angry" or "calm_angry.jsonl".

    Raises:
        NotFoundError: no dataset of that name is bundled.
    """
    stem = name.removesuffix(".jsonl")
    if stem not in dataset_names():
        raise NotFoundError(f"no bundled dataset {name!r}; there is: {', '.join(dataset_names()) or 'none'}")
    return _HERE / "data" / f"{stem}.jsonl"


def open_questions() -> list[str]:
    """Returns questions of all kinds that any chat model answers, written for this package."""
    text = (_HERE / "data" / "open_questions.txt").read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line]


def dataset_path(name_or_path: str | Path) -> Path:
    """Returns a dataset's file: the one at this path, or else the bundled one of this name.

    Raises:
        NotFoundError: there is neither.
    """
    path = Path(name_or_path)
    if path.exists():
        return path
    try:
        return data_path(str(name_or_path))
    except NotFoundError:
        raise NotFoundError(
            f"no dataset at {name_or_path}, and no bundled one of that name: give the path of a .jsonl file."
        ) from None


def sae_path(name: str) -> Path:
    """Returns the folder of the sparse autoencoder of a bundled model.

    Raises:
        NotFoundError: none of that name is bundled.
    """
    folder = _HERE / "saes" / name
    if not (folder / "cfg.json").exists():
        there = sorted(path.parent.name for path in _HERE.glob("saes/*/cfg.json"))
        raise NotFoundError(f"no bundled sparse autoencoder {name!r}; there is: {', '.join(there) or 'none'}")
    return folder


def saes_file() -> Path:
    """Returns the list of sparse autoencoders that are known by their models' names."""
    return _HERE / "saes.json"


def tone_words() -> dict[str, list[str]]:
    """Returns the words that tell each tone of `mx-tiny`'s texts, such as "calm" or "angry"."""
    words: dict[str, list[str]] = json.loads((_HERE / "data" / "tone_words.json").read_text(encoding="utf-8"))
    return words
