"""Where the stream usually is: its mean over the tokens of answers, at each layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..forward import packs_for
from ..intervention import widest
from ..models.adapter import ModelAdapter, exclusive, undisturbed
from ..pack import Pair
from ..passes import visit_residuals
from ..ranks import current_ranks, dealt

__all__ = ["stream_means"]


def stream_means(adapter: ModelAdapter, pairs: Sequence[Pair], layers: Sequence[int]) -> dict[int, Tensor]:
    """``{layer: [d_model]}``, the mean of the stream that enters each layer at the answers' tokens.

    Args:
        adapter: the model.
        pairs: (prompt ids, answer ids).
        layers: 0 … n_layers.
    """
    sums: dict[int, Tensor] = {}
    n = sum(len(answer) for _, answer in pairs)
    ranks = current_ranks(adapter)
    with exclusive(adapter), torch.no_grad(), undisturbed(adapter.hf_model), ranks.together():
        for pack in dealt(packs_for(adapter, pairs, processes=ranks.sharing), ranks, "Means"):

            def reader(layer: int, pack: Any = pack) -> Any:
                def read(hidden: Tensor) -> None:
                    part = pack.tokens_of(hidden).to(widest(hidden.device)).sum(0)
                    sums[layer] = sums[layer] + part if layer in sums else part

                return read

            visit_residuals(adapter, pack, {layer: reader(layer) for layer in layers})
    nothing = torch.zeros(adapter.d_model, dtype=torch.float64)
    return {layer: (ranks.total(sums.get(layer, nothing)) / n).float().cpu() for layer in layers}
