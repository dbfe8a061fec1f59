"""A batch is what each row is alone, also where rotary factors depend on the length of the whole call."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import httpx
import pytest
import torch
from families import FAMILIES, n_hooks, tiny_tokenizer
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import mechanex
from mechanex.engine import forward
from mechanex.engine.beam import _rows_for, most_likely_completions
from mechanex.engine.beam_rows import Rows
from mechanex.engine.caa import caa_vectors
from mechanex.engine.capabilities.caches import reads_again
from mechanex.engine.capabilities.packing import packing_form
from mechanex.engine.generate import generate_batch
from mechanex.engine.models import adapter_for
from mechanex.engine.models.adapter import undisturbed
from mechanex.engine.pack import build_packs
from mechanex.engine.passes import Resumed
from mechanex.engine.regimes import first_change, length_dependent, regime, text_lengths
from mechanex.engine.score import completion_logprobs
from mechanex.errors import ValidationError

ORIGINAL = 16  # texts of more tokens have other factors

_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
    "long_factor": [2.0, 3.0, 4.0, 5.0, 6.0, 7.0],
    "factor": 4.0,
    "original_max_position_embeddings": ORIGINAL,
}
_DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 3.0}
_DEFAULT = {"rope_type": "default", "rope_theta": 10_000.0}
# Factors of the one kind of layer depend on the length, those of the other don't.
_BY_LAYER = {"full_attention": _LONGROPE, "sliding_attention": _DEFAULT}


def phi3():
    return FAMILIES["phi3"](rope_parameters=_LONGROPE, original_max_position_embeddings=ORIGINAL)


def longrope():
    return FAMILIES["llama"](rope_parameters=_LONGROPE)


def dynamic():
    return FAMILIES["llama"](rope_parameters=_DYNAMIC, max_position_embeddings=ORIGINAL)


def by_layer():
    return FAMILIES["gemma3"](rope_parameters=_BY_LAYER)


def rows_only():
    """Takes no tree mask: texts of all lengths are rows of one padded batch."""
    model = dynamic()
    adapter_for(model).findings["form"] = "padded"
    adapter_for(model).findings[f"form beyond {ORIGINAL} tokens"] = "padded"
    return model


MODELS = {f.__name__: f for f in (phi3, longrope, dynamic, by_layer, rows_only)}


def ids(n: int, seed: int) -> list[int]:
    return torch.randint(3, 376, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def alone(make, prompt, completion):
    """[n_tokens] log-probabilities from a model that has seen nothing else."""
    with torch.no_grad():
        logits = make()(input_ids=torch.tensor([prompt + completion]), use_cache=False).logits[0]
    rows = torch.arange(len(prompt) - 1, len(prompt) + len(completion) - 1)
    return logits.log_softmax(-1)[rows, completion]


@pytest.mark.parametrize("name", MODELS)
def test_scores_are_those_of_each_text_alone(name):
    make = MODELS[name]
    model = make()
    shared = ids(12, 9)
    texts = [(ids(7, 1), ids(3, 2)), (ids(37, 3), ids(4, 4)), (ids(6, 5), ids(2, 6))]
    # One prompt, completions that end before, at and after the length at which factors change.
    texts += [(shared, ids(n, 10 + n)) for n in (1, 4, 5, 9)]
    for order in (texts, texts[::-1]):
        found = completion_logprobs(model, [p for p, _ in order], [c for _, c in order])
        for values, (prompt, completion) in zip(found.tokens, order, strict=True):
            torch.testing.assert_close(values, alone(make, prompt, completion), rtol=1e-4, atol=1e-4)
    assert n_hooks(model) == 0


@pytest.mark.parametrize("name", ["phi3", "dynamic"])
def test_caa_reads_what_each_text_alone_has(name):
    make = MODELS[name]
    prompts, plus, minus = [ids(6, 1), ids(30, 2)], [ids(3, 3), ids(2, 4)], [ids(11, 5), ids(4, 6)]
    vector = caa_vectors(make(), prompts, plus, minus, layers=[2])
    truth = 0.0
    for prompt, *answers in zip(prompts, plus, minus, strict=True):
        for sign, answer in zip((1, -1), answers, strict=True):
            with torch.no_grad():
                out = make()(input_ids=torch.tensor([prompt + answer]), output_hidden_states=True)
            truth = truth + sign * out.hidden_states[2][0, len(prompt) :].mean(0) / len(prompts)
    torch.testing.assert_close(vector[2], truth, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["phi3", "dynamic"])
def test_passes_resumed_at_a_layer_give_what_each_text_alone_gives(name):
    adapter = adapter_for((make := MODELS[name])())
    pairs = [(ids(5, 1), ids(4, 2)), (ids(25, 3), ids(3, 4)), (ids(13, 5), ids(4, 6))]
    for pack in forward.packs_for(adapter, pairs, scoring=True):
        resumed = Resumed(adapter, pack, 1)
        assert resumed.residual is not None
        with torch.no_grad():
            found = adapter.unembedding.logits(resumed.scored()).log_softmax(-1)
        for i in pack.pair.unique().tolist():
            mine = pack.pair == i
            values = found[mine].gather(1, pack.target[mine][:, None])[:, 0]
            torch.testing.assert_close(values, alone(make, *pairs[i]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["phi3", "dynamic"])
def test_beams_are_those_of_whole_passes_over_each_prompt(name):
    model = MODELS[name]()
    adapter = adapter_for(model)
    # The first crosses the length at which factors change while it grows; the second doesn't.
    prompts = [ids(14, 1), ids(5, 2)]
    steps = [torch.tensor([7]), torch.tensor([8]), torch.tensor([9]), torch.tensor([10])]
    with torch.no_grad():
        cached = _rows_for(adapter, prompts, len(steps))
        assert len(cached) == 1, "the prompts run together"
        whole = [Rows(adapter_for(MODELS[name]()), [prompt], cached=False) for prompt in prompts]
        for token in [None, *steps]:
            if token is not None:
                for rows in (*cached, *whole):
                    rows.extend(torch.tensor([0]), token)
            truth = torch.cat([rows.logits() for rows in whole])
            torch.testing.assert_close(cached[0].logits(), truth, rtol=1e-4, atol=1e-4)


def test_a_beam_search_beside_a_long_prompt_is_the_one_with_it_alone():
    from families import tiny_tokenizer

    def search(**options):
        return most_likely_completions(
            phi3(), ids(14, 1), ids(40, 2), tiny_tokenizer(), k=3, iters=4, **options
        )

    cached, whole = search(), search(model_kwargs={"use_cache": False})
    assert cached.token_ids == whole.token_ids
    torch.testing.assert_close(cached.scores, whole.scores, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["phi3", "longrope", "dynamic", "by_layer"])
def test_rows_of_a_batch_get_their_own_factors_while_nothing_disturbs(name):
    """What a batch of one's own gets that names each row's positions, and rows that are read in pieces."""
    make = MODELS[name]
    model = make()
    short, long = ids(6, 1), ids(30, 2)
    with torch.no_grad(), undisturbed(model):
        model(input_ids=torch.tensor([ids(60, 3)]))  # a longer text was here before
        mask = torch.tensor([[0] * 24 + [1] * 6, [1] * 30])
        places = (mask.cumsum(1) - 1).clamp(min=0)
        batch = torch.tensor([[0] * 24 + short, long])
        both = model(input_ids=batch, attention_mask=mask, position_ids=places).logits[:, -1]
        with text_lengths(torch.tensor([[30]])):
            out = model(input_ids=torch.tensor([long[:8]]), use_cache=True)
            rest = torch.arange(8, 30)[None]
            cache = out.past_key_values
            pieces = model(
                input_ids=torch.tensor([long[8:]]), position_ids=rest, past_key_values=cache
            ).logits
    with torch.no_grad():
        truth = torch.cat([make()(input_ids=torch.tensor([text])).logits[:, -1] for text in (short, long)])
    torch.testing.assert_close(both, truth, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(pieces[:, -1], truth[1:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["phi3", "dynamic"])
def test_generation_does_not_depend_on_what_ran_before(name):
    make = MODELS[name]
    prompt = torch.tensor([ids(20, 1)])
    options = {
        "max_new_tokens": 6,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    model = make()
    with torch.no_grad():
        truth = make().generate(prompt, **options).logits
        model(input_ids=torch.tensor([ids(60, 2)]))
        with undisturbed(model):
            after = model.generate(prompt, **options).logits
    torch.testing.assert_close(torch.cat(after), torch.cat(truth), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["phi3", "longrope"])
def test_answers_beside_a_long_neighbour_are_those_alone_in_python_and_over_http(name):
    make, tokenizer = MODELS[name], tiny_tokenizer()
    # Of the short ones one stays below the length at which factors change, one crosses it, one begins there.
    prompts, new = [ids(4, 1), ids(45, 2), ids(12, 3), ids(ORIGINAL, 4)], 8
    truths = []
    for prompt in prompts:
        found = make().generate(torch.tensor([prompt]), max_new_tokens=new, do_sample=False)
        truths.append(tokenizer.decode(found[0, len(prompt) :], skip_special_tokens=True))
    model = make()
    options = {"max_tokens": new, "sampling_method": "greedy"}
    texts = generate_batch(model, tokenizer, prompts, **options)
    assert texts == [generate_batch(make(), tokenizer, [prompt], **options)[0] for prompt in prompts]
    assert all(text.endswith(truth) for text, truth in zip(texts, truths, strict=True))

    def ask(url, prompt):
        asked = {"model": type(model).__name__, "prompt": prompt, "max_tokens": new, "temperature": 0}
        return httpx.post(f"{url}/v1/completions", json=asked, timeout=60).json()["choices"][0]["text"]

    client = mechanex.Mechanex().set_local_model(model, tokenizer)
    with client.serve(host="127.0.0.1", port=0, block=False) as server, ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda prompt: ask(server.url, prompt), prompts * 2))
    assert answers == truths * 2


def test_lengths_of_equal_factors_have_equal_keys():
    adapter = adapter_for(phi3())
    assert first_change(adapter.hf_model) == ORIGINAL
    assert len({regime(adapter.hf_model, n) for n in range(1, ORIGINAL + 1)}) == 1
    assert len({regime(adapter.hf_model, n) for n in range(ORIGINAL + 1, 60)}) == 1
    assert regime(adapter.hf_model, ORIGINAL) != regime(adapter.hf_model, ORIGINAL + 1)
    adapter = adapter_for(dynamic())
    assert first_change(adapter.hf_model) == ORIGINAL
    assert len({regime(adapter.hf_model, n) for n in range(1, 60)}) == 1 + 59 - ORIGINAL
    adapter = adapter_for(FAMILIES["llama"]())
    assert first_change(adapter.hf_model) is None and regime(adapter.hf_model, 3) == regime(
        adapter.hf_model, 100_000
    )


def test_a_model_whose_generation_starts_over_where_factors_change_is_known():
    asked = [reads_again(adapter_for(phi3()), n) for n in (ORIGINAL, ORIGINAL + 1, ORIGINAL + 2)]
    assert asked == [False, True, False]
    assert not any(reads_again(adapter_for(dynamic()), n) for n in (ORIGINAL + 1, ORIGINAL + 2))


def test_settings_that_change_are_seen():
    model = FAMILIES["llama"](rope_parameters=dict(_DYNAMIC))
    assert len(length_dependent(model)) == 1
    model.model.rotary_emb = nn.Identity()
    assert not length_dependent(model)


class _Scaled(nn.Module):
    """Embeddings times the logarithm of the call's length, which nothing in the model tells of."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, ids):
        return self.inner(ids) * torch.tensor(float(ids.shape[1])).log()


def test_a_model_that_depends_on_the_width_of_the_batch_runs_each_text_by_itself(caplog):
    def make():
        model = FAMILIES["llama"]()
        model.model.embed_tokens = _Scaled(model.model.embed_tokens)
        return model

    model = make()
    texts = [(ids(7, 1), ids(3, 2)), (ids(12, 3), ids(4, 4))]
    with caplog.at_level("INFO", "mechanex"):
        packs = forward.packs_for(adapter_for(model), texts)
    assert [len(p.input_ids) for p in packs] == [1, 1]
    assert "one text at a time" in caplog.text
    for some in (texts, texts[:1]):
        found = completion_logprobs(model, [p for p, _ in some], [c for _, c in some])
        for values, text in zip(found.tokens, some, strict=True):
            torch.testing.assert_close(values, alone(make, *text), rtol=1e-4, atol=1e-4)


def test_the_check_is_made_once_more_where_text_outgrows_what_the_settings_name():
    adapter = adapter_for(phi3())
    packing_form(adapter, 10)
    assert not any("beyond" in name for name in adapter.findings)
    packing_form(adapter, ORIGINAL + 1)
    assert f"form beyond {ORIGINAL} tokens" in adapter.findings


class _Largest(TorchDispatchMode):
    """The bytes of the largest tensor that was made."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.numel() * tensor.element_size())
        return out


def test_masks_of_a_long_prompt_with_many_completions_stay_within_their_bound():
    adapter = adapter_for(FAMILIES["llama"](max_position_embeddings=1 << 15))
    prompt = ids(8_000, 1)
    pairs = [(prompt, ids(60, i)) for i in range(400)] + [(ids(20_000, 2), [5, 6]), (ids(20_000, 2), [7, 8])]
    adapter.findings["form"] = adapter.findings["form beyond 32768 tokens"] = "plain"
    packs = forward.packs_for(adapter, pairs, scoring=True)
    size = adapter.dtype.itemsize
    trees = [p.input_ids.shape for p in packs if p.layout == "tree"]
    assert trees and max(b * t * t * size for b, t in trees) <= forward.MASK_BYTES
    # The prompt runs again only as often as the bound asks for, and what is too long for a mask is alone in its row.
    assert len(trees) == 7
    assert [tuple(p.input_ids.shape) for p in packs if p.layout == "padded"] == [(1, 20_001)] * 2
    assert sorted(torch.cat([p.pair.unique() for p in packs]).tolist()) == list(range(402))


def test_completions_of_one_token_share_a_prompt_that_is_too_long_for_a_mask():
    pairs = [([5] * 100, [6]), ([5] * 100, [7]), ([5] * 100, [8, 9])]
    (pack,) = build_packs(pairs, last_tokens=False, mask_entries=50 * 50)
    assert pack.layout == "padded" and tuple(pack.input_ids.shape) == (1, 101)
    assert pack.predictor[pack.pair < 2].tolist() == [99, 99]


def test_making_a_mask_takes_little_more_than_the_mask():
    pairs = [([5] * 1500, [6] * 10)] * 100
    (pack,) = build_packs(pairs, row_tokens=4_000, batch_tokens=4_000)
    with _Largest() as seen:
        mask = pack.additive_mask(torch.bfloat16, window=700)
    n = pack.input_ids.shape[1]
    assert n == 2_500 and tuple(mask.shape) == (1, 1, n, n)
    assert seen.bytes <= max(2 * n * n, 8 * (1 << 22))
    assert torch.equal(mask[:, 0] == 0, pack.visible(700))


def test_batch_tokens_bound_trees_as_well():
    adapter = adapter_for(FAMILIES["llama"]())
    pairs = [(ids(20, 1), ids(5, i)) for i in range(30)] + [(ids(60, 2), ids(5, 3))]
    packs = forward.packs_for(adapter, pairs, scoring=True, batch_tokens=50)
    assert sorted(p.input_ids.numel() for p in packs)[-2] <= 50
    assert max(p.input_ids.numel() for p in packs) == 64  # one pair that is longer alone


def test_dynamic_factors_stretch_a_context_as_far_as_they_are_made_for():
    prompt, tokenizer = list(range(3, 3 + ORIGINAL + 5)), tiny_tokenizer()
    model = dynamic()
    assert adapter_for(model).context == 3 * ORIGINAL
    truth = dynamic().generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)[0].tolist()
    assert generate_batch(model, tokenizer, [prompt], max_tokens=8, sampling_method="greedy") == [
        tokenizer.decode(truth)
    ]
    with pytest.raises(ValidationError, match=f"context of {3 * ORIGINAL}"):
        generate_batch(model, tokenizer, [prompt * 3], max_tokens=8)


@pytest.mark.parametrize(
    ("named", "times"),
    [
        ({"rope_parameters": _DYNAMIC}, 3),
        ({"rope_parameters": {"full_attention": _DYNAMIC, "sliding_attention": _DEFAULT}}, 3),
        ({"rope_parameters": {"full_attention": _DYNAMIC, "sliding_attention": _DYNAMIC}}, 3),
        ({"rope_parameters": {"full_attention": _DEFAULT, "sliding_attention": _DYNAMIC}}, 1),
        ({"rope_parameters": {"sliding_attention": _DYNAMIC}}, 3),
        ({"rope_parameters": {"full_attention": _DYNAMIC, "sliding_attention": None}}, 3),
        ({"rope_parameters": _LONGROPE}, 1),
        ({"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 3.0}}, 3),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": None}}, 1),
        ({}, 1),
    ],
)
@pytest.mark.parametrize("multimodal", [False, True])
def test_a_context_is_read_wherever_a_configuration_puts_its_rotary_parameters(named, times, multimodal):
    model = FAMILIES["llama"]()
    text = SimpleNamespace(max_position_embeddings=ORIGINAL, **named)
    wrapper = SimpleNamespace(max_position_embeddings=7, get_text_config=lambda: text)
    model.config = wrapper if multimodal else text
    assert adapter_for(model).context == times * ORIGINAL
    model.config.max_position_embeddings = text.max_position_embeddings = None
    assert adapter_for(model).context is None


def test_texts_outgrow_a_context_that_layers_of_one_kind_stretch():
    by_kind = {"full_attention": _DYNAMIC, "sliding_attention": _DEFAULT}
    model = FAMILIES["gemma3"](rope_parameters=by_kind, max_position_embeddings=ORIGINAL)
    prompt, tokenizer = list(range(3, 3 + ORIGINAL + 5)), tiny_tokenizer()
    (text,) = generate_batch(model, tokenizer, [prompt], max_tokens=8, sampling_method="greedy")
    assert len(text) > len(tokenizer.decode(prompt))
    with pytest.raises(ValidationError, match=f"context of {3 * ORIGINAL}"):
        generate_batch(model, tokenizer, [prompt * 3], max_tokens=8)
