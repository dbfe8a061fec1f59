"""What a beam search must find, from plain passes of one completion at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from families import BOS, build, tiny_tokenizer
from torch import nn

from mechanex.utils.steering_opt import sample_most_likely_completions_hf

TOKENIZER = tiny_tokenizer()
DST, SRC = [BOS, 5, 70, 90, 33, 21, 254], [BOS, 44, 50]
ROUNDING: dict[str, float] = {"rtol": 1e-4, "atol": 1e-6}


def token_probs(model: nn.Module, prompt: list[int], completion: list[int]) -> list[float]:
    """The probability of each token of a completion, from one plain pass without a cache."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + completion]), use_cache=False).logits[0]
    probs = logits[len(prompt) - 1 : -1].double().softmax(-1)
    return [float(row[token]) for row, token in zip(probs, completion, strict=True)]


def true_scores(model: nn.Module, completion: list[int], dst: list[int], src: list[int] | None) -> np.ndarray:
    """The scores of a completion's tokens, as they are defined."""
    scores = np.array(token_probs(model, dst, completion))
    return scores if src is None else scores - token_probs(model, src, completion)


def sample(**options: Any) -> tuple[list[str], np.ndarray]:
    """The documented function, on a random Llama and ``DST`` unless told otherwise."""
    model, prompt = options.pop("model", None), options.pop("dst_prompt", DST)
    model = build("llama") if model is None else model
    return sample_most_likely_completions_hf(model, TOKENIZER, prompt, **options)
