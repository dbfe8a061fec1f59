"""Perplexity of completions."""

from __future__ import annotations

import math

import pytest
import torch
from families import FAMILIES, build, tiny_tokenizer

from mechanex.engine.hooks import Intervention, SteeringPlan
from mechanex.engine.intervention import Edit
from mechanex.engine.models import adapter_for
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


@pytest.mark.parametrize("tokens", [None, slice(None, -1), slice(-2, None), 1], ids=str)
@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_steered_by_position_batched_equals_one_by_one(name, tokens):
    model, tokenizer = build(name), tiny_tokenizer()
    vector = 3 * torch.randn(48, generator=torch.Generator().manual_seed(0))
    with SteeringPlan([Intervention(1, Edit.add(vector), tokens=tokens)]).apply(model):
        together = math.log(perplexity(model, PROMPTS, COMPLETIONS, tokenizer))
        alone = [
            math.log(perplexity(model, [p], [c], tokenizer))
            for p, c in zip(PROMPTS, COMPLETIONS, strict=True)
        ]
    sizes = [len(encode_pair(tokenizer, p, c)[1]) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    expected = sum(a * n for a, n in zip(alone, sizes, strict=True)) / sum(sizes)
    assert together == pytest.approx(expected, rel=1e-4)


def test_rows_of_a_batch_mean_nothing_to_the_engines_own_batches():
    model = FAMILIES["llama"]()
    plan = SteeringPlan([Intervention(1, Edit.add(torch.ones(48)), rows=[1])])
    with plan.apply(model), pytest.raises(ValidationError, match="lays out its own batches"):
        perplexity(model, PROMPTS, COMPLETIONS, tiny_tokenizer())
    assert perplexity(model, PROMPTS, COMPLETIONS, tiny_tokenizer()) > 1
    assert adapter_for(model).findings["form"] == "plain"


def test_a_text_that_could_not_be_less_likely_is_infinite_not_an_error():
    model = FAMILIES["llama"]()
    model.lm_head.weight.data *= 1e4
    assert perplexity(model, PROMPTS, COMPLETIONS, tiny_tokenizer()) == math.inf
