"""Attention of a step whose queries share keys: the keys are read once for all of a group, not copied for each.

New versions of transformers do so themselves, and are left to it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn

from ..._private.transformers import ALL_ATTENTION_FUNCTIONS, GROUPS_QUERIES, attending_by

__all__ = ["grouped_attention"]

_NAME = "mechanex_grouped"
_PLAIN = "sdpa"


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """As transformers' attention functions: query [rows, heads, new, width], fewer heads of key and value."""
    rows, heads, new, width = query.shape
    held = key.shape[1]
    if (
        heads == held
        or heads % held
        or dropout
        or attention_mask is None
        or attention_mask.ndim != 4
        or attention_mask.shape[:3] != (rows, 1, new)
        # A tensor or a fraction may bend the scores (sinks, a bias, a soft cap).
        or any(isinstance(extra, float) for extra in kwargs.values())
        or any(isinstance(extra, Tensor) and name not in _UNUSED for name, extra in kwargs.items())
    ):
        plain = ALL_ATTENTION_FUNCTIONS[_PLAIN]
        return plain(  # type: ignore[no-any-return]
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    group = heads // held
    # The queries of a group stand one after another, as more queries of their one key head.
    together = query.reshape(rows, held, group * new, width)
    mask = attention_mask[:, :, None].expand(rows, 1, group, new, -1).reshape(rows, 1, group * new, -1)
    found = nn.functional.scaled_dot_product_attention(together, key, value, attn_mask=mask, scale=scaling)
    return found.reshape(rows, heads, new, -1).transpose(1, 2).contiguous(), None


# Handed on to every attention function, and read by none that gets its mask ready-made.
_UNUSED = ("position_ids", "cache_position", "cu_seq_lens_q", "cu_seq_lens_k")


def grouped_attention(model: nn.Module) -> AbstractContextManager[None]:
    """Runs a block in which the layers of a model that use torch's attention do so in this way."""
    if GROUPS_QUERIES:
        return nullcontext()
    if _NAME not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS.register(_NAME, _attend)
    return attending_by(model, _NAME)
