"""Perplexity of completions."""

from __future__ import annotations

import math

import pytest
import torch
from families import build, tiny_tokenizer

from mechanex.engine.score import perplexity
from mechanex.engine.text import encode_pair
from mechanex.errors import ValidationError

PROMPTS, COMPLETIONS = (
    ["The morning was", "A woman", "A woman"],
    [" cold and quiet.", " sings", " knew every child"],
)


@pytest.mark.parametrize("name", ["llama", "bloom", "cohere", "gemma2"])
def test_it_is_the_mean_over_tokens_of_one_by_one_losses(name):
    model, tokenizer = build(name), tiny_tokenizer()
    losses = []
    for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
        ids, answer = encode_pair(tokenizer, prompt, completion)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids + answer]), use_cache=False).logits[
                0, len(ids) - 1 : -1
            ]
        losses += torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="none").tolist()
    expected = math.exp(sum(losses) / len(losses))
    assert perplexity(model, PROMPTS, COMPLETIONS, tokenizer) == pytest.approx(expected, rel=1e-4)


def test_wrong_input_is_an_error():
    with pytest.raises(ValidationError, match="1 prompts but 2 completions"):
        perplexity(build("llama"), ["a"], ["b", "c"], tiny_tokenizer())
    with pytest.raises(ValidationError, match="no tokens"):
        perplexity(build("llama"), ["a"], [""], tiny_tokenizer())
