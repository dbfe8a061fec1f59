"""Steering vectors from two lists of prompts that are no pairs: the difference of their mean activations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..errors import ValidationError
from .activations import activations
from .caa import ROUNDING, default_layer
from .given import as_list
from .intervention import compute_dtype
from .models import adapter_for
from .models.adapter import ModelAdapter
from .provenance import FIT, figures
from .text import Prompt
from .vectors import SteeringVector

__all__ = ["difference_vectors"]


def difference_vectors(
    model: nn.Module | ModelAdapter,
    positive: Sequence[Prompt],
    negative: Sequence[Prompt],
    layers: Sequence[int] | None = None,
    tokenizer: Any = None,
    *,
    tokens: str | int | slice = "last",
    progress: bool = False,
) -> SteeringVector:
    """For each layer the mean over one list's prompts minus that over the other's, of the mean over their tokens.

    Args:
        model: a Hugging Face or TransformerLens model.
        positive, negative: text, token ids or chat messages; the lists may differ in length.
        layers: negatives from the end; None for one, two thirds of the way up.
        tokenizer: needed for text when the model carries none.
        tokens: as in :func:`.activations.activations`.
        progress: show a progress bar.

    Raises:
        ValidationError: an empty list, a layer that doesn't exist, or means that are the same or not finite.
    """
    adapter = adapter_for(model)
    lists = (as_list("positive", positive, "prompts"), as_list("negative", negative, "prompts"))
    chosen = [default_layer(adapter.n_layers)] if layers is None else layers
    means = []
    for prompts in lists:
        found = activations(adapter, prompts, chosen, tokenizer, tokens=tokens, progress=progress)
        means.append(
            {n: torch.stack([torch.from_numpy(x).double().mean(0) for x in found.by_text(n)]) for n in found}
        )
    vectors, fit = {}, {}
    for layer, own in means[0].items():
        vector = own.mean(0) - means[1][layer].mean(0)
        size = float(torch.cat([own, means[1][layer]]).norm(dim=1).mean())
        norm = float(vector.norm())
        if not ROUNDING * size < norm < float("inf"):
            raise ValidationError(
                f"The vector at layer {layer} is zero or not finite ({norm}): the prompts do not differ there; check "
                "them and the model."
            )
        vectors[layer] = vector.to(compute_dtype(adapter.dtype))
        fit[layer] = {"of_stream": norm / size}
    return SteeringVector(
        vectors,
        model=adapter.model_id,
        model_family=adapter.family,
        method="difference",
        metadata={FIT: figures(fit), "tokens_read": str(tokens)},
    )
