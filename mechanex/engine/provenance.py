"""Where a steering vector comes from, as fields of its metadata: the examples, the model, the day, the fit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from datetime import datetime, timezone
from typing import Any

__all__ = ["FIT", "data_fields", "figures", "origin_fields"]

FIT = "fit"
"""The field with the figures of the fit, JSON by layer."""


def figures(fit: Mapping[int, Mapping[str, Any]]) -> str:
    """Figures by layer as JSON, of numbers with six digits."""
    rounded = {
        str(layer): {name: float(f"{x:.6g}") if isinstance(x, float) else x for name, x in told.items()}
        for layer, told in fit.items()
    }
    return json.dumps(rounded)


def data_fields(
    examples: Sequence[Sequence[Any]], *, name: str | None = None, split: str | None = None
) -> dict[str, str]:
    """What identifies examples.

    Args:
        examples: lists of one length or of several: prompts, positive answers, negative ones.
        name: of their file or set.
        split: of it.

    Returns:
        ``data_count`` (of the first list), ``data_sha256`` (of them all as JSON), and ``data_name`` and ``data_split``
        where they are known.
    """
    text = json.dumps([list(one) for one in examples], default=_plain, ensure_ascii=False)
    found = {
        "data_count": str(len(examples[0])),
        "data_sha256": hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest(),
    }
    named = {"data_name": name, "data_split": split}
    return found | {key: value for key, value in named.items() if value is not None}


def origin_fields(hf_model: Any) -> dict[str, str]:
    """The day, and the model's revision where it came from a hub."""
    found = {"date": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    revision = getattr(getattr(hf_model, "config", None), "_commit_hash", None)
    return found | ({"model_revision": revision} if isinstance(revision, str) else {})


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return value.tolist() if hasattr(value, "tolist") else list(value)
