"""Wrapping a loaded transformers model in a TransformerLens ``TransformerBridge`` (the ``lens`` extra)."""

from __future__ import annotations

import copy
import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ValidationError
from ...extras import install_line
from ..caches import returned_caches
from ..capabilities.probing import close
from .configuration import text_config

__all__ = ["installed", "official_name", "require", "same", "unsuitable", "watched", "wrap"]

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
            f"Run: {install_line('lens')}. Or use backend='transformers'."
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
    if text_config(config) is not config and importlib.util.find_spec("torchvision") is None:
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


WITHOUT, WITH = "without a cache", "with a cache"
_PROBE, _STEPS = 8, 2  # tokens of the text that is compared, and how many of them come one by one


def watched(model: nn.Module) -> dict[str, Tensor]:
    """Logits [1, T, n_vocab] of a short text, without a cache and, where the model keeps one, with it.

    Args:
        model: a transformers causal model, or the one inside a bridge.
    """
    config = text_config(model.config)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (1, _PROBE), generator=generator).to(
        next(model.parameters()).device
    )
    with torch.no_grad():
        found = {WITHOUT: model(input_ids=ids, use_cache=False, return_dict=True).logits}
        try:
            out = model(input_ids=ids[:, :-_STEPS], use_cache=True, return_dict=True)
            steps, caches = [out.logits], returned_caches(out)
            for i in range(_PROBE - _STEPS, _PROBE):
                # Recurrent models read the mask of the tokens at hand: none is needed for a single text.
                out = model(input_ids=ids[:, i : i + 1], use_cache=True, return_dict=True, **caches)
                steps.append(out.logits)
        except TypeError:
            return found
    return found | {WITH: torch.cat(steps, 1)}


def same(bridge: nn.Module, plain: dict[str, Tensor]) -> None:
    """Checks that a bridge computes what :func:`watched` saw of the plain model.

    Raises:
        RuntimeError: it doesn't; the text says with or without a cache.
    """
    inner: Any = bridge.original_model
    found = watched(inner)
    for how, truth in plain.items():
        if how not in found or not close(found[how], truth):
            raise RuntimeError(
                f"its bridge computes something else than the model {how}; this version of TransformerLens doesn't fit "
                "this version of transformers."
            )


@contextmanager
def _own_log_level() -> Iterator[None]:
    """Importing TransformerLens silences transformers' warnings; this keeps the user's level."""
    logger = logging.getLogger("transformers")
    level = logger.level
    try:
        yield
    finally:
        logger.setLevel(level)
