"""The small model, the contrastive datasets and the word lists that come with the package."""

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


def data_path(name: str) -> Path:
    """Returns the file of a bundled dataset, such as "calm_angry" or "calm_angry.jsonl".

    Raises:
        NotFoundError: no dataset of that name is bundled.
    """
    names = sorted(path.stem for path in (_HERE / "data").glob("*.jsonl"))
    stem = name.removesuffix(".jsonl")
    if stem not in names:
        raise NotFoundError(f"no bundled dataset {name!r}; there is: {', '.join(names) or 'none'}")
    return _HERE / "data" / f"{stem}.jsonl"


def tone_words() -> dict[str, list[str]]:
    """Returns the words that tell each tone of `mx-tiny`'s texts, such as "calm" or "angry"."""
    words: dict[str, list[str]] = json.loads((_HERE / "data" / "tone_words.json").read_text(encoding="utf-8"))
    return words
