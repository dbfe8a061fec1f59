"""Wrapping a loaded transformers model in a TransformerLens ``TransformerBridge`` (the ``lens`` extra)."""

from __future__ import annotations

import copy
import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from torch import nn

from ...errors import ValidationError

__all__ = ["installed", "official_name", "require", "unsuitable", "wrap"]

OLDEST = 4  # the first version whose only model class is the bridge


def _found_version() -> str | None:
    if importlib.util.find_spec("transformer_lens") is None:
        return None
    try:
        return version("transformer-lens")
    except PackageNotFoundError:
        return None


def installed() -> bool:
    """Whether TransformerLens 4 or later can be imported; does not import it."""
    found = _found_version()
    return found is not None and int(found.split(".")[0]) >= OLDEST


def require() -> None:
    """Raises a ValidationError that says how to install TransformerLens, unless it is there."""
    if not installed():
        found = _found_version()
        state = "is not installed" if found is None else f"is {found} here, too old"
        raise ValidationError(
            f"backend='transformer_lens' needs TransformerLens {OLDEST} or later, which {state}. "
            "Run: pip install 'mechanex[lens]'. Or use backend='transformers'."
        )


def official_name(short: str) -> str | None:
    """The Hub name that TransformerLens' table gives for a short name, or None."""
    with _own_log_level():
        from transformer_lens.supported_models import get_official_model_name
    try:
        return str(get_official_model_name(short))
    except ValueError:
        return None


def unsuitable(config: Any) -> str | None:
    """Why a model of this configuration should not be wrapped, or None."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if text is not config and importlib.util.find_spec("torchvision") is None:
        # TransformerLens would run pip by itself.
        return "it takes images or sound too, for which TransformerLens needs torchvision (pip install it)."
    return None


def wrap(model: nn.Module, name: str, tokenizer: Any) -> nn.Module:
    """A ``TransformerBridge`` around the model, whose modules it replaces in place.

    Args:
        model: a transformers causal model.
        name: how the bridge calls it.
        tokenizer: left as it is; the bridge gets a copy that encodes in the same way.
    """
    with _own_log_level():
        from transformer_lens.model_bridge import TransformerBridge
    own = copy.deepcopy(tokenizer)
    settings = own.init_kwargs
    before = settings.get("add_bos_token")
    settings.setdefault("name_or_path", name)
    # Otherwise the bridge reads the tokenizer anew, so that it adds a BOS even where the model's own doesn't.
    settings["add_bos_token"] = True
    weight = next(model.parameters())
    bridge: nn.Module = TransformerBridge.boot_transformers(
        name, hf_model=model, tokenizer=own, dtype=model.dtype, device=str(weight.device)
    )
    settings.pop("add_bos_token")
    if before is not None:
        settings["add_bos_token"] = before
    return bridge


@contextmanager
def _own_log_level() -> Iterator[None]:
    """Importing TransformerLens silences transformers' warnings; this keeps the user's level."""
    logger = logging.getLogger("transformers")
    level = logger.level
    try:
        yield
    finally:
        logger.setLevel(level)
