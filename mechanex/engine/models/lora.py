"""Adapters of peft (LoRA and its like), in a folder or on the Hub: a base model by name, and what was trained on it."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ...errors import MechanexError, ValidationError
from ...extras import install_line
from .sources import ADAPTER_CONFIG, Source, explain, find_source

__all__ = ["Adapted", "adapted", "add_adapter"]


@dataclass(frozen=True)
class Adapted:
    """An adapter and the model that it belongs to.

    Args:
        base: where the base model is.
        tokenizer: where the tokenizer is: the adapter's folder if it holds one, else the base's.
        adapter: where the adapter is, in a folder; None where the base is read with it.
        options: the base's own arguments of ``from_pretrained``, in place of the adapter's.
    """

    base: Source
    tokenizer: Source
    adapter: Source | None = None
    options: dict[str, Any] = field(default_factory=dict)


def adapted(source: Source, kwargs: dict[str, Any]) -> Adapted | None:
    """What an adapter is made of; None for any other source.

    Args:
        source: what is loaded.
        kwargs: for ``from_pretrained``; on the Hub they are the adapter's (``revision``, ``subfolder``).

    Raises:
        ValidationError: peft isn't installed, or the adapter's configuration can't be read or names no base model.
        NotFoundError: the base model isn't there.
    """
    on_hub = source.kind == "hub"
    found_in = _fetched(source, kwargs) if on_hub else Path(source.location)
    if found_in is None or not (found_in / ADAPTER_CONFIG).is_file():
        return None
    folder, config = found_in, found_in / ADAPTER_CONFIG
    if importlib.util.find_spec("peft") is None:
        raise ValidationError(
            f"{source.name} is an adapter (it holds {ADAPTER_CONFIG}), which peft loads, and peft is not installed. "
            f"Run: {install_line('lora')}."
        )
    own = [name for name in ("tokenizer.json", "tokenizer_config.json") if (folder / name).is_file()]
    if (folder / "config.json").is_file():  # a whole model that was saved with its adapter
        return Adapted(source, source, options=kwargs)
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
    adapter = replace(source, location=str(folder), kind="folder")
    options = dict(kwargs)
    if on_hub:
        options = {n: v for n, v in kwargs.items() if n not in ("revision", "subfolder")}
        if isinstance(revision := read.get("revision"), str):
            options["revision"] = revision
    return Adapted(found, adapter if own else found, adapter, options)


def _fetched(source: Source, kwargs: dict[str, Any]) -> Path | None:
    """The folder in the Hub's cache with the files of an adapter; None where the name is of no adapter.

    What else may be wrong with the name is told where the model is read.
    """
    from huggingface_hub import hf_hub_download, snapshot_download

    where = {n: kwargs[n] for n in ("revision", "token", "cache_dir", "local_files_only") if n in kwargs}
    inside = f"{kwargs['subfolder'].strip('/')}/" if kwargs.get("subfolder") else ""
    try:
        config = hf_hub_download(source.location, inside + ADAPTER_CONFIG, **where)
        kinds = ("adapter_*", "*.json", "*.jinja", "*.model", "*.txt")
        snapshot_download(source.location, allow_patterns=[inside + kind for kind in kinds], **where)
    except Exception:  # the Hub's client and what it connects by have no common base
        return None
    return Path(config).parent


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
