"""Under which names a model hands its cache on, and whether its own ``generate`` ever reads the text again."""

from __future__ import annotations

from typing import Any, cast

import torch

from ..._private.torch import without_hooks
from ..caches import returned_caches
from ..models.adapter import ModelAdapter
from ..regimes import regime

__all__ = ["cache_names", "reads_again"]


def reads_again(adapter: ModelAdapter, length: int) -> bool:
    """Whether the model's own ``generate`` reads the whole text again, not one token, when it gets ``length`` tokens.

    Phi-3 does where its factors change: keys that were turned by others are of no use to it. Other models go on with
    the keys that they have.

    Args:
        adapter: the model.
        length: tokens of the text after a step of decoding, 2 or more.
    """
    if regime(adapter.hf_model, length) == regime(adapter.hf_model, length - 1):
        return False
    from transformers import DynamicCache

    prepare: Any = getattr(adapter.hf_model, "prepare_inputs_for_generation", None)
    if prepare is None:
        return False
    cache = DynamicCache()
    kept = torch.zeros(1, 1, length - 1, 1)
    cache.update(kept, kept, 0)
    ids = torch.zeros(1, length, dtype=torch.int64, device=adapter.device)
    options: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "next_sequence_length": 1}
    options |= dict.fromkeys(cache_names(adapter), cache)
    made = prepare(ids, use_cache=True, **options)
    return bool(made["input_ids"].shape[1] == length)


def cache_names(adapter: ModelAdapter) -> tuple[str, ...]:
    """What the model calls the cache that it returns and takes, as a pass over one token shows."""
    if "cache names" not in adapter.findings:
        ids = torch.zeros(1, 1, dtype=torch.int64, device=adapter.device)
        with torch.no_grad(), without_hooks(adapter.hf_model):
            out: Any = adapter.hf_model(input_ids=ids, use_cache=True, return_dict=True)
        adapter.findings["cache names"] = tuple(returned_caches(out))
    return cast("tuple[str, ...]", adapter.findings["cache names"])
