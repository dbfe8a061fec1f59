"""transformers: what its documentation doesn't name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.integrations import sdpa_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

__all__ = [
    "ALL_ATTENTION_FUNCTIONS",
    "CAPTURING",
    "GROUPS_QUERIES",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "Cache",
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "attending_by",
    "tensor_parallel",
]
# Of the layers, the rolling cache uses: keys, values, is_initialized, update, get_seq_length and get_mask_sizes.

CAPTURING = "transformers.utils.output_capturing"
"""The module of the hooks by which transformers collects hidden states; they stay on a model."""

GROUPS_QUERIES = hasattr(sdpa_attention, "pack_gqa")
"""Whether transformers' own way to call torch's attention reads keys once for all queries that share them."""

_ATTENTION = "_attn_implementation_internal"


@contextmanager
def attending_by(model: nn.Module, name: str) -> Iterator[None]:
    """Runs a block in which the layers of a model that use torch's attention use the registered function of this name.

    The documented setter of a configuration would change those of the parts too, whatever they are.
    """
    configs: dict[int, dict[str, Any]] = {}
    for module in model.modules():
        settings = getattr(getattr(module, "config", None), "__dict__", {})
        if settings.get(_ATTENTION) == "sdpa":
            configs[id(settings)] = settings
    try:
        for settings in configs.values():
            settings[_ATTENTION] = name
        yield
    finally:
        for settings in configs.values():
            settings[_ATTENTION] = "sdpa"


def tensor_parallel(size: int) -> Any:
    """What ``from_pretrained`` takes as ``distributed_config`` to split a model over so many processes.

    Raises:
        ImportError, TypeError: this transformers can't.
    """
    from transformers.distributed import configuration_utils

    return configuration_utils.DistributedConfig(tp_size=size)
