"""What the stream entering each layer would predict, through the model's own final norm and unembedding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy
import torch
from torch import nn

from ..errors import ValidationError
from .activations import activations
from .models import adapter_for
from .models.adapter import ModelAdapter, exclusive, undisturbed
from .text import Prompt
from .whole import as_whole

__all__ = ["logit_lens"]


def logit_lens(
    model: nn.Module | ModelAdapter,
    texts: Sequence[Prompt],
    layers: Sequence[int] | None = None,
    tokenizer: Any = None,
    *,
    top: int = 5,
) -> dict[int, list[list[tuple[str, float]]]]:
    """The likeliest next tokens that each layer would choose after each text (nostalgebraist, 2020).

    Args:
        model: a Hugging Face or TransformerLens model with a language head.
        texts: text, token ids or chat messages.
        layers: as in :func:`.activations.activations`.
        tokenizer: needed when the model carries none.
        top: how many tokens.

    Returns:
        ``{layer: for each text [(token, probability), …]}``, likeliest first.

    Raises:
        ValidationError: as there, no tokenizer, no language head, or a ``top`` that is no number of tokens.
    """
    adapter = adapter_for(model)
    tokenizer = tokenizer if tokenizer is not None else adapter.tokenizer
    if tokenizer is None:
        raise ValidationError(f"{adapter.model_id} carries no tokenizer to write tokens: pass tokenizer=….")
    most = as_whole(top)
    if most is None or most < 1:
        raise ValidationError(f"top is a number of tokens, at least 1; got {top!r}.")
    head = adapter.unembedding
    streams = activations(adapter, texts, layers, tokenizer)
    found = {}
    with exclusive(adapter), torch.no_grad(), undisturbed(adapter.hf_model):
        for layer, rows in streams.items():
            hidden = torch.from_numpy(numpy.asarray(rows)).to(adapter.device, adapter.dtype)
            likely = (
                head.logits(adapter.finish(hidden)).float().softmax(-1).topk(min(most, head.weight.shape[0]))
            )
            found[layer] = [
                [(tokenizer.decode([token]), share) for token, share in zip(tokens, shares, strict=True)]
                for tokens, shares in zip(likely.indices.tolist(), likely.values.tolist(), strict=True)
            ]
    return found
