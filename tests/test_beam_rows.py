"""Beams run in batches and with caches score as plain passes do, steered or not, and leave the model alone."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from beam_truth import DST, ROUNDING, SRC, TOKENIZER, sample, token_probs, true_scores
from families import D_MODEL, FAMILIES, SLIDING, build, n_hooks, sliding_family
from torch import nn
from transformers import LlamaForCausalLM

from mechanex.engine.beam import most_likely_completions
from mechanex.engine.caches import find_cache, is_cache, returned_caches
from mechanex.engine.hooks import Intervention, SteeringPlan
from mechanex.engine.intervention import Edit
from mechanex.engine.models import adapter_for, lens
from mechanex.errors import MechanexError, ValidationError
from mechanex.utils.steering_opt import (
    hf_hooks_contextmanager,
    make_steering_hook_hf,
    make_steering_hook_tflens,
)


@pytest.mark.ci
@pytest.mark.parametrize("name", FAMILIES)
def test_cached_equals_uncached_equals_plain_passes(name):
    model = build(name)
    for src in (SRC, [*SRC, *DST]):
        cached = most_likely_completions(model, DST, src, TOKENIZER, k=4, iters=4)
        whole = most_likely_completions(
            model, DST, src, TOKENIZER, k=4, iters=4, model_kwargs={"use_cache": False}
        )
        assert cached.token_ids == whole.token_ids and cached.texts == whole.texts
        np.testing.assert_allclose(cached.scores, whole.scores, **ROUNDING)
        expected = [true_scores(model, ids, DST, src) for ids in cached.token_ids]
        np.testing.assert_allclose(cached.scores, expected, **ROUNDING)
    # Mamba's state in the first versions of transformers 5 has no way to reorder its rows.
    caches = returned_caches(model(torch.tensor([[5, 6, 7]]), use_cache=True, return_dict=True)).values()
    reorders = all(hasattr(cache, "reorder_cache") for cache in caches)
    assert adapter_for(model).findings["beam form"] == ("together" if reorders else "whole")
    assert reorders or name == "mamba"


@pytest.mark.parametrize("name", [*SLIDING, "gpt_neo"])
def test_prompts_that_outgrow_an_attention_window(name):
    model = sliding_family(name, 8) if name in SLIDING else FAMILIES[name](window_size=8)
    prompt = torch.randint(3, 300, (30,), generator=torch.Generator().manual_seed(0)).tolist()
    for src in (prompt[:20], prompt[:3]):
        found = most_likely_completions(model, prompt, src, TOKENIZER, k=3, iters=4)
        expected = [true_scores(model, ids, prompt, src) for ids in found.token_ids]
        np.testing.assert_allclose(found.scores, expected, **ROUNDING)
    assert adapter_for(model).findings["beam form beyond 8 tokens"] == "together"


# Models that can't do it in the usual way


class Unpadded(LlamaForCausalLM):
    """Counts positions from the first column, padding or not, as some models' own code does."""

    def forward(self, input_ids, use_cache=None, return_dict=True, **more):
        cache = {name: value for name, value in more.items() if is_cache(value)}
        return super().forward(input_ids=input_ids, use_cache=use_cache, **cache)


class Shuffled(LlamaForCausalLM):
    """Its cache takes no new order."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        for cache in filter(is_cache, out.values()):
            cache.reorder_cache = lambda rows: None
        return out


class Cacheless(LlamaForCausalLM):
    """Gives no cache, takes no mask, and unembeds every position."""

    def forward(self, input_ids, attention_mask=None, use_cache=False, return_dict=True):
        assert not use_cache, "this model has no cache"
        return super().forward(input_ids=input_ids, use_cache=False)


@pytest.mark.parametrize(("kind", "form"), [(Unpadded, "apart"), (Shuffled, "whole"), (Cacheless, "whole")])
def test_a_model_that_padding_or_a_new_order_would_confuse_is_run_another_way(kind, form):
    model = kind(build("llama").config).eval()
    model.load_state_dict(build("llama").state_dict())
    found = most_likely_completions(model, DST, SRC, TOKENIZER, k=4, iters=3)
    usual = most_likely_completions(build("llama"), DST, SRC, TOKENIZER, k=4, iters=3)
    assert adapter_for(model).findings["beam form"] == form
    assert found.token_ids == usual.token_ids
    np.testing.assert_allclose(found.scores, usual.scores, **ROUNDING)


def test_steering_that_breaks_the_logits_decides_nothing_about_the_model():
    model = FAMILIES["gpt2"]()
    huge = torch.full((D_MODEL,), 3e38)
    with (
        hf_hooks_contextmanager(model, [(1, make_steering_hook_hf(huge))]),
        pytest.raises(MechanexError, match="NaN: the steering is too strong"),
    ):
        most_likely_completions(model, DST, None, TOKENIZER)
    assert "beam form" not in adapter_for(model).findings
    most_likely_completions(model, DST, None, TOKENIZER)
    assert adapter_for(model).findings["beam form"] == "together"


@pytest.mark.usefixtures("fitting_bridges")
@pytest.mark.parametrize("name", ["llama", "gpt2", "mamba"])
def test_transformer_lens_models_give_the_same(name):
    bridge = lens.wrap(FAMILIES[name](), name, TOKENIZER)
    vector = 2 * torch.randn(D_MODEL)
    plain = {}
    for model in (build(name), bridge):
        with SteeringPlan([Intervention(1, Edit.add(vector), tokens=slice(-2, None))]).apply(model):
            plain[model] = most_likely_completions(model, DST, SRC, TOKENIZER, k=3, iters=2)
    ours, theirs = plain.values()
    assert ours.token_ids == theirs.token_ids
    np.testing.assert_allclose(ours.scores, theirs.scores, rtol=1e-3, atol=1e-5)


def test_two_prompts_share_a_batch_and_the_cache_holds_k_rows_for_each():
    model, shapes, cached = build("llama"), [], []

    def note(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        shapes.append(tuple(kwargs["input_ids"].shape))
        cache = find_cache(kwargs.values())
        cached.append(None if cache is None else tuple(cache.layers[0].keys.shape[::2]))

    sample(src_prompt=SRC, k=4, iters=2)
    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    sample(src_prompt=SRC, k=4, iters=2)
    handle.remove()
    assert shapes == [(2, len(DST)), (8, 1), (8, 1)]
    assert cached == [None, (8, len(DST)), (8, len(DST) + 1)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_scores_are_wide_whatever_the_models_dtype(dtype):
    model = FAMILIES["llama"]().to(dtype)
    found = most_likely_completions(model, DST, SRC, TOKENIZER, k=4, iters=3)
    expected = [true_scores(model, ids, DST, SRC) for ids in found.token_ids]
    np.testing.assert_allclose(found.scores, expected, atol=0.05 if dtype == torch.bfloat16 else 1e-12)
    assert found.scores.dtype == torch.float64
    assert adapter_for(model).findings["beam form"] == "together"


# Steering


TOKENS = [None, 0, 3, slice(2, None), slice(-2, None), slice(None, -1), -1, 8]


@pytest.mark.parametrize(
    ("name", "token"),
    [
        *(("llama", token) for token in TOKENS),
        *((name, token) for name in ("gpt2", "bloom", "mamba") for token in (None, 3, slice(-2, None))),
    ],
    ids=str,
)
def test_steering_counts_at_the_positions_that_each_completion_has_alone(name, token):
    model = FAMILIES[name]()
    vector = 3 * torch.randn(D_MODEL, generator=torch.Generator().manual_seed(3))
    plain = most_likely_completions(model, DST, SRC, TOKENIZER, k=3, iters=3)
    with hf_hooks_contextmanager(model, [(1, make_steering_hook_hf(vector, token=token))]):
        for use_cache in (True, False):
            found = most_likely_completions(
                model, DST, SRC, TOKENIZER, k=3, iters=3, model_kwargs={"use_cache": use_cache}
            )
            expected = [
                steered(model, DST, ids, vector, token) - steered(model, SRC, ids, vector, token)
                for ids in found.token_ids
            ]
            np.testing.assert_allclose(found.scores, expected, **ROUNDING)
    assert not torch.allclose(plain.scores, found.scores, rtol=1e-3)
    after = most_likely_completions(model, DST, SRC, TOKENIZER, k=3, iters=3)
    assert after.token_ids == plain.token_ids and torch.equal(after.scores, plain.scores)


def steered(
    model: nn.Module, prompt: list[int], ids: list[int], vector: torch.Tensor, token: Any
) -> np.ndarray:
    """Token probabilities of a plain pass whose residual stream at layer 1 was edited by hand."""
    places = torch.zeros(len(prompt) + len(ids), dtype=torch.bool)
    if token is None:
        places[:] = True
    elif isinstance(token, int):
        at = token if token >= 0 else len(prompt) + token
        places[[at] if at < len(places) else []] = True
    else:
        start, stop = (x + len(prompt) if x is not None and x < 0 else x for x in (token.start, token.stop))
        places[slice(start, stop)] = True

    def edit(hidden: torch.Tensor) -> torch.Tensor:
        return hidden + places[:, None] * vector

    adapter = adapter_for(model)
    hooks = [dict(block._forward_pre_hooks) for block in adapter.layers]
    for block in adapter.layers:
        block._forward_pre_hooks.clear()  # what is attached by the test stays out of the truth
    handle = adapter.on_residual(1, edit)
    try:
        return np.array(token_probs(model, prompt, ids))
    finally:
        handle.remove()
        for block, kept in zip(adapter.layers, hooks, strict=True):
            block._forward_pre_hooks.update(kept)


def test_hooks_that_name_rows_of_a_batch_are_refused():
    model = FAMILIES["llama"]()
    plan = SteeringPlan([Intervention(1, Edit.add(torch.ones(D_MODEL)), rows=[0])])
    with plan.apply(model), pytest.raises(ValidationError, match="lays out its own batches"):
        most_likely_completions(model, DST, None, TOKENIZER)


def test_a_transformer_lens_hook_with_a_token_needs_nothing_more():
    """Under a cache the hook asks for the positions, which the search knows."""
    model = build("llama")
    adapter, vector = adapter_for(model), 3 * torch.randn(D_MODEL)
    with hf_hooks_contextmanager(model, [(1, make_steering_hook_hf(vector, token=slice(-1, None)))]):
        expected = most_likely_completions(model, DST, SRC, TOKENIZER, k=3, iters=2)
    handle = adapter.on_residual(1, make_steering_hook_tflens(vector, token=slice(-1, None)))
    try:
        found = most_likely_completions(model, DST, SRC, TOKENIZER, k=3, iters=2)
    finally:
        handle.remove()
    assert found.token_ids == expected.token_ids and torch.equal(found.scores, expected.scores)


# What is left behind


def state(model: nn.Module) -> Any:
    return (
        [m.training for m in model.modules()],
        [(p.requires_grad, p.grad, p._version) for p in model.parameters()],
        n_hooks(model),
        model.generation_config.to_dict(),
        model.config.to_dict(),
        torch.get_rng_state().tolist(),
        torch.is_grad_enabled(),
    )


def test_the_model_is_left_as_it_was_also_by_an_error():
    model = FAMILIES["llama"](attention_dropout=0.5)
    expected = sample(model=model, src_prompt=SRC, k=3, iters=2)
    model.train()
    model.model.layers[0].eval()
    before = state(model)
    texts, scores = sample(model=model, src_prompt=SRC, k=3, iters=2)
    assert texts == expected[0] and (scores == expected[1]).all()  # no dropout
    assert state(model) == before

    calls = itertools.count()

    def fail(*_: Any) -> None:
        if next(calls) == 2:
            raise RuntimeError("out of memory")

    handle = model.model.layers[2].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        sample(model=model, src_prompt=SRC, k=3, iters=2)
    handle.remove()
    assert state(model) == before


def test_no_gradients_are_recorded():
    model = FAMILIES["llama"]()
    found = most_likely_completions(model, DST, None, TOKENIZER)
    assert (
        not found.scores.requires_grad and found.log_scores is not None and not found.log_scores.requires_grad
    )
