"""transformers: what its documentation doesn't name."""

from __future__ import annotations

from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

__all__ = [
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "Cache",
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
]
# Of the layers, the rolling cache uses: keys, values, is_initialized, update, get_seq_length and get_mask_sizes.
