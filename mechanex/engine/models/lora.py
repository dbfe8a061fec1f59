"""Adapter folders of peft (LoRA and its like): a base model named in the folder, and what was trained on top of it."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import MechanexError, ValidationError
from .sources import ADAPTER_CONFIG, Source, explain, find_source

__all__ = ["Adapted", "adapted", "add_adapter"]


@dataclass(frozen=True)
class Adapted:
    """An adapter and the model that it belongs to.

    Args:
        base: where the base model is.
        tokenizer: where the tokenizer is: the adapter's folder if it holds one, else the base's.
    """

    base: Source
    tokenizer: Source


def adapted(source: Source) -> Adapted | None:
    """What the folder of an adapter is made of; None for any other source.

    Raises:
        ValidationError: peft isn't installed, or the adapter's configuration can't be read or names no base model.
        NotFoundError: the base model isn't there.
    """
    folder = Path(source.location)
    config = folder / ADAPTER_CONFIG
    if source.kind == "hub" or not config.is_file():
        return None
    if importlib.util.find_spec("peft") is None:
        raise ValidationError(
            f"{source.name} is an adapter (it holds {ADAPTER_CONFIG}), which peft loads, and peft is not installed. "
            "Run: pip install 'mechanex[lora]'."
        )
    own = [name for name in ("tokenizer.json", "tokenizer_config.json") if (folder / name).is_file()]
    if (folder / "config.json").is_file():  # a whole model that was saved with its adapter
        return Adapted(source, source)
    try:
        read = json.loads(config.read_text(encoding="utf-8"))
        base = read["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValidationError(f"{config} is no configuration of an adapter: {error!r}.") from error
    if not isinstance(base, str) or not base:
        raise ValidationError(
            f"{config} names no base model: write its name or folder there as base_model_name_or_path."
        )
    try:
        found = find_source(base)
    except MechanexError as error:
        raise type(error)(
            f"{source.name} is an adapter of {base!r}, which is needed with it (base_model_name_or_path in "
            f"{ADAPTER_CONFIG}): {error}"
        ) from error
    return Adapted(found, source if own else found)


def add_adapter(model: Any, source: Source) -> None:
    """Puts an adapter's weights on its base model, frozen, and checks that all of them fit.

    Raises:
        ValidationError: unreadable weights, an adapter of another model, or one that changes prompts, not weights.
    """
    problem = None
    try:
        info = model.load_adapter(source.location)
    except Exception as error:  # as in reading a model: no common base
        problem = explain(error, source, "adapter")
    if problem is not None:
        raise problem
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = sorted(map(str, getattr(info, what, None) or ()))
        if keys:
            raise ValidationError(
                f"The adapter {source.name} doesn't fit its base model: {what.replace('_', ' ')} "
                f"{', '.join(keys[:3])}. Load it with the model that it was trained on."
            )
    model.eval()
