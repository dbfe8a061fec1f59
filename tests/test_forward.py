"""Packed passes give what one-by-one passes give, in every family; upper layers resume exactly, gradients too."""

from __future__ import annotations

import logging

import pytest
import torch
from families import FAMILIES, SLIDING, build, n_hooks, sliding_family

from mechanex.engine.capabilities.packing import packing_form
from mechanex.engine.capabilities.replaying import replay_agrees
from mechanex.engine.forward import packs_for, scored_logits
from mechanex.engine.hooks import Intervention, SteeringPlan
from mechanex.engine.intervention import Edit
from mechanex.engine.models import adapter_for
from mechanex.engine.passes import Resumed, visit_residuals
from mechanex.errors import ValidationError

PADDED = {"bloom", "mpt", "mamba"}


def ragged_pairs(vocab: int, longest: int = 14) -> list[tuple[list[int], list[int]]]:
    generator = torch.Generator().manual_seed(1)

    def draw(n: int) -> list[int]:
        return torch.randint(3, vocab, (n,), generator=generator).tolist()

    prompts = [draw(n) for n in (longest, 1, 6, 3, longest // 2)]
    return [
        (p, draw(n))
        for p, sizes in zip(prompts, [(3, 1), (2,), (5, 2, 1), (4,), (1, 6)], strict=True)
        for n in sizes
    ]


def one_by_one(model, pairs):
    with torch.no_grad():
        for prompt, completion in pairs:
            logits = model(input_ids=torch.tensor([prompt + completion]), use_cache=False).logits
            yield logits[0, len(prompt) - 1 : -1]


def check_equal(model, pairs, **options):
    adapter = adapter_for(model)
    truths = list(one_by_one(model, pairs))
    seen = set()
    with torch.no_grad():
        for pack in packs_for(adapter, pairs, **options):
            logits = scored_logits(adapter, pack)
            for i in pack.pair.unique().tolist():
                torch.testing.assert_close(logits[pack.pair == i], truths[i], rtol=1e-4, atol=1e-4)
                seen.add(i)
    assert seen == set(range(len(pairs)))


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_logits_equal_one_by_one(name):
    model = build(name)
    check_equal(model, ragged_pairs(model.config.vocab_size), row_tokens=30)
    form = packing_form(adapter_for(model), 20)
    assert (form == "padded") == (name in PADDED), f"{name} is run as {form}"


@pytest.mark.parametrize("name", SLIDING)
def test_packed_logits_equal_one_by_one_past_the_sliding_window(name):
    model = sliding_family(name, 8)
    check_equal(model, ragged_pairs(model.config.vocab_size, longest=30), row_tokens=64)
    assert packing_form(adapter_for(model), 31) in ("window", "dict")


def test_the_window_forms_are_tried_only_when_text_outgrows_the_window():
    adapter = adapter_for(sliding_family("mistral", 24))
    pairs = ragged_pairs(100)
    packs_for(adapter, pairs)
    assert packing_form(adapter, 20) == "plain"
    assert not any("beyond" in name for name in adapter.findings)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "gemma2"])
def test_packed_logits_equal_one_by_one_in_bfloat16(name):
    model = FAMILIES[name]().bfloat16()
    adapter = adapter_for(model)
    pairs = ragged_pairs(model.config.vocab_size)
    truths = list(one_by_one(model, pairs))
    with torch.no_grad():
        for pack in packs_for(adapter, pairs):
            logits = scored_logits(adapter, pack)
            for i in pack.pair.unique().tolist():
                ours, truth = logits[pack.pair == i].float(), truths[i].float()
                assert (ours - truth).norm() < 0.06 * truth.norm()


@pytest.mark.parametrize("name", FAMILIES)
def test_resuming_at_a_layer_equals_whole_passes(name, caplog):
    model = build(name)
    adapter = adapter_for(model)
    pairs = ragged_pairs(model.config.vocab_size)
    (pack,) = packs_for(adapter, pairs, batch_tokens=10_000)
    v = torch.linspace(-1, 1, adapter.d_model)
    assert replay_agrees(adapter), f"{name} fell back to whole passes"
    kept = Resumed(adapter, pack, 2)
    gradients = []
    for whole in (False, True):
        vector = v.clone().requires_grad_()
        with SteeringPlan([Intervention(2, Edit.add(vector)), Intervention(3, Edit.add(vector))]).apply(
            adapter
        ):
            hidden = None if whole else kept.scored()
            logits = scored_logits(adapter, pack, hidden)
        loss = logits.log_softmax(-1).gather(1, pack.target[:, None]).sum()
        (gradient,) = torch.autograd.grad(loss, vector)
        gradients.append((loss.detach(), gradient))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-4)


def with_a_side_channel():
    """A Llama whose last layer adds what only whole passes carry over from layer 2: a replay would be stale."""
    model = FAMILIES["llama"]()
    state = {"whole": False, "carried": 0.0}
    model.register_forward_pre_hook(lambda *_: state.update(whole=True))
    model.register_forward_hook(lambda *_: state.update(whole=False), always_call=True)
    model.model.layers[2].register_forward_hook(
        lambda m, args, out: state.update(carried=out.detach()) if state["whole"] else None
    )
    model.model.layers[3].register_forward_hook(lambda m, args, out: out + state["carried"])
    return model


def test_a_model_that_cannot_be_replayed_is_noticed_and_that_is_said_once(caplog):
    adapter = adapter_for(with_a_side_channel())
    with caplog.at_level(logging.INFO, "mechanex"):
        assert not replay_agrees(adapter) and not replay_agrees(adapter)
    assert sum("can't be resumed" in r.message for r in caplog.records) == 1


def test_reading_the_residual_stops_early_and_sees_active_steering():
    model = build("llama")
    adapter = adapter_for(model)
    (pack,) = packs_for(adapter, ragged_pairs(model.config.vocab_size), batch_tokens=10_000)
    reached = []
    handle = model.model.layers[2].register_forward_hook(lambda *_: reached.append(2))
    seen = {}

    def read(name):
        return lambda hidden: seen.__setitem__(name, hidden)

    with torch.no_grad():
        visit_residuals(adapter, pack, {2: read("plain")})
        with SteeringPlan([Intervention(2, Edit.add(torch.ones(adapter.d_model)))]).apply(model):
            visit_residuals(adapter, pack, {2: read("steered")})
    handle.remove()
    assert not reached
    torch.testing.assert_close(seen["steered"], seen["plain"] + 1)


def test_a_pass_leaves_flags_mode_and_hooks_alone():
    from mechanex.engine.models.adapter import undisturbed

    model = FAMILIES["llama"]().train()
    model.lm_head.weight.requires_grad_(False)
    model.model.layers[1].eval()
    before = ([m.training for m in model.modules()], [p.requires_grad for p in model.parameters()])
    with pytest.raises(RuntimeError, match="inside"), undisturbed(model):
        assert not any(m.training for m in model.modules())
        raise RuntimeError("inside")
    assert before == ([m.training for m in model.modules()], [p.requires_grad for p in model.parameters()])
    packing_form(adapter_for(model), 5)
    replay_agrees(adapter_for(model))
    assert before == ([m.training for m in model.modules()], [p.requires_grad for p in model.parameters()])
    assert n_hooks(model) == 0


def test_text_longer_than_the_position_table_is_an_error():
    model = build("gpt2")
    with pytest.raises(ValidationError, match=r"300 tokens, but .* has 256 positions"):
        packs_for(adapter_for(model), [([5] * 299, [6])])


def test_no_pairs_is_an_error():
    with pytest.raises(ValidationError, match="nothing to run"):
        packs_for(adapter_for(build("llama")), [])
