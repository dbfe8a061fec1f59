"""CAA vectors: packed batches give the textbook mean difference, in every family and at every layer."""

from __future__ import annotations

import pytest
import torch
from counting import counted_ops, kernels
from families import FAMILIES, N_LAYERS, build, tiny_tokenizer

from mechanex.engine import caa
from mechanex.engine.caa import caa_vectors
from mechanex.engine.text import encode_pair
from mechanex.errors import ValidationError
from mechanex.utils.steering_opt import hf_hooks_contextmanager, make_activs_hook_hf

TOKENIZER = tiny_tokenizer()
PROMPTS = ["The morning was", "She said that the", "A woman", "In the winter the snow covers the roofs and"]
POSITIVE = [" calm.", " bread was warm.", " opened", " sings"]
NEGATIVE = [" cold and the street was quiet.", " train", " knew every child", " cries"]


def textbook(model, layer):
    """One answer at a time, its own pass each, means taken as they are defined."""
    differences = []
    for prompt, *sides in zip(PROMPTS, POSITIVE, NEGATIVE, strict=True):
        means = []
        for answer in sides:
            ids, tokens = encode_pair(TOKENIZER, prompt, answer)
            seen = []
            with hf_hooks_contextmanager(model, [(layer, make_activs_hook_hf(seen))]), torch.no_grad():
                model(input_ids=torch.tensor([ids + tokens]), use_cache=False)
            means.append(seen[0][0, len(ids) :].mean(0))
        differences.append(means[0] - means[1])
    return torch.stack(differences).mean(0)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_layer_equals_the_definition(name):
    model = build(name)
    layers = range(N_LAYERS + 1)  # the last is the stream that leaves the last block
    found = caa_vectors(model, PROMPTS, POSITIVE, NEGATIVE, layers, TOKENIZER, row_tokens=48, batch_tokens=64)
    assert list(found) == list(layers)
    for layer in layers:
        torch.testing.assert_close(found[layer], textbook(model, layer), rtol=1e-4, atol=1e-4)


def test_the_default_layer_is_two_thirds_up_and_negatives_count_from_the_end():
    model = build("llama")
    assert list(caa_vectors(model, PROMPTS, POSITIVE, NEGATIVE, tokenizer=TOKENIZER)) == [2]
    assert list(caa_vectors(model, PROMPTS, POSITIVE, NEGATIVE, [-1, 0], TOKENIZER)) == [0, 3]


def test_the_order_of_examples_and_the_batching_do_not_matter():
    model = build("llama")
    one = caa_vectors(model, PROMPTS, POSITIVE, NEGATIVE, [1], TOKENIZER)
    other = caa_vectors(model, PROMPTS[::-1], POSITIVE[::-1], NEGATIVE[::-1], [1], TOKENIZER, batch_tokens=1)
    torch.testing.assert_close(one[1], other[1], rtol=1e-5, atol=1e-5)


def test_the_vector_says_where_it_came_from():
    found = caa_vectors(build("llama"), PROMPTS, POSITIVE, NEGATIVE, [1], TOKENIZER)
    assert found.method == "caa" and found.site == "resid_pre" and found[1].dtype == torch.float32


def test_half_precision_models_give_float32_vectors():
    model = FAMILIES["llama"]().bfloat16()
    found = caa_vectors(model, PROMPTS, POSITIVE, NEGATIVE, [2], TOKENIZER)
    truth = textbook(build("llama"), 2)
    assert found[2].dtype == torch.float32
    assert torch.cosine_similarity(found[2], truth, dim=0) > 0.99


def test_means_are_as_precise_as_the_model_whatever_torchs_default_is():
    model = FAMILIES["llama"]().double()
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = caa_vectors(model, PROMPTS, POSITIVE, NEGATIVE, [0], TOKENIZER)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(found[0], textbook(model, 0), rtol=1e-12, atol=1e-14)


def test_autocast_does_not_round_the_means():
    """At the first layer activations are the embeddings, which autocast leaves alone."""
    model = build("llama")
    with torch.autocast("cpu", torch.bfloat16):
        found = caa_vectors(model, PROMPTS, POSITIVE, NEGATIVE, [0], TOKENIZER)
    torch.testing.assert_close(found[0], textbook(model, 0), rtol=1e-5, atol=1e-6)


def test_training_mode_and_flags_are_put_back_and_dropout_is_off():
    model = FAMILIES["gpt2"]().train()
    found = caa_vectors(model, PROMPTS, POSITIVE, NEGATIVE, [3], TOKENIZER)
    assert model.training and all(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(found[3], textbook(build("gpt2"), 3), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("prompts", "positive", "negative", "layers", "message"),
    [
        (["a"], ["b", "c"], ["d"], [0], "one length; got 1, 2 and 1"),
        ([], [], [], [0], "no examples"),
        (["a"], ["b"], ["c"], [5], "Layer 5 does not exist"),
        (["a"], ["b"], ["c"], [], "no layers"),
        (["a"], [""], ["c"], [0], "no tokens"),
        ("a", "b", "c", [0], "lists, one entry per example"),
        (["a"], [" b"], [" c"], 1, "list of layers"),
        ([[5, 99999]], [[6]], [[7]], [0], "99999 is outside the vocabulary"),
        (["a"], [" b"], [" b"], [2], "zero: the positive and negative answers do not differ"),
        (["a", "a"], [" b", " c"], [" c", " b"], [2], "zero"),
    ],
)
def test_wrong_input_is_an_error(prompts, positive, negative, layers, message):
    with pytest.raises(ValidationError, match=message):
        caa_vectors(build("llama"), prompts, positive, negative, layers, TOKENIZER)


def test_other_tokens_than_all_or_the_last_are_an_error():
    with pytest.raises(ValidationError, match="tokens is 'all' or 'last'; got 'first'"):
        caa_vectors(build("llama"), ["a"], [" b"], [" c"], [2], TOKENIZER, tokens="first")


def test_a_model_that_gives_nan_is_an_error():
    model = FAMILIES["llama"]()
    model.model.layers[0].mlp.down_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(ValidationError, match="not finite"):
        caa_vectors(model, PROMPTS, POSITIVE, NEGATIVE, [2], TOKENIZER)


def test_a_layer_costs_three_kernels_and_no_wait_for_the_device(monkeypatch):
    """Its tokens are picked, summed by weight and measured, in float32; nothing is read before the passes are over."""
    model, passes = build("llama"), []
    visit = caa.visit_residuals
    monkeypatch.setattr(
        caa, "visit_residuals", lambda *args: passes.append(counted_ops(lambda: visit(*args)))
    )
    counts = []
    for layers in ([N_LAYERS - 1], range(N_LAYERS)):  # of as many blocks that are run
        passes.clear()
        caa_vectors(model, PROMPTS, POSITIVE, NEGATIVE, layers, TOKENIZER, batch_tokens=8192)
        counts += passes
    one, every = counts
    assert kernels(every) - kernels(one) == 3 * (N_LAYERS - 1)
    assert not every["_local_scalar_dense"]
