"""How likely a model finds given completions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..errors import ValidationError
from .forward import packs_for, scored_logits
from .models import adapter_for
from .models.adapter import ModelAdapter, exclusive, undisturbed
from .text import Prompt, encode_pair

__all__ = ["perplexity"]


def perplexity(
    model: nn.Module | ModelAdapter,
    prompts: Sequence[Prompt],
    completions: Sequence[str],
    tokenizer: Any = None,
    *,
    batch_tokens: int | None = None,
) -> float:
    """The perplexity of completions after their prompts: exp of the mean negative log-probability of their tokens.

    Args:
        model: a Hugging Face or TransformerLens model; steering that is applied to it counts.
        prompts: text, token ids or chat messages, one per completion.
        completions: texts, none of them empty.
        tokenizer: needed for text when the model carries none.
        batch_tokens: most tokens in one pass; None for what suits the device.

    Returns:
        1 or more; the mean is over tokens, not over completions.

    Raises:
        ValidationError: lists of unequal length or empty, or an empty completion.
    """
    if isinstance(prompts, str) or isinstance(completions, str):
        raise ValidationError(
            "prompts and completions are lists, one prompt per completion; got a single text."
        )
    if len(prompts) != len(completions):
        raise ValidationError(f"There are {len(prompts)} prompts but {len(completions)} completions.")
    adapter = adapter_for(model)
    tokenizer = tokenizer if tokenizer is not None else adapter.tokenizer
    pairs = [encode_pair(tokenizer, p, c) for p, c in zip(prompts, completions, strict=True)]
    total = 0.0
    with exclusive(adapter), torch.no_grad(), undisturbed(adapter.hf_model):
        for pack in packs_for(adapter, pairs, batch_tokens=batch_tokens):
            log_probs = scored_logits(adapter, pack).float().log_softmax(-1)
            total -= float(log_probs.gather(1, pack.target[:, None]).double().sum())
    mean = total / sum(len(completion) for _, completion in pairs)
    return math.exp(mean) if mean < 700 else math.inf
