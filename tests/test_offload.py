"""Models whose weights are on the CPU, on the disk or nowhere between calls."""

from __future__ import annotations

import pytest
import torch
from families import D_MODEL, FAMILIES, N_LAYERS, build, tiny_tokenizer

from mechanex import SteeringVector, ValidationError
from mechanex.engine.caa import caa_vectors
from mechanex.engine.capabilities.unembedding import unembedding_agrees
from mechanex.engine.generate import generate
from mechanex.engine.models import adapter_for
from mechanex.engine.score import completion_logprobs
from mechanex.utils.steering_opt import TrainingDatapoint, optimize_vector

accelerate = pytest.importorskip("accelerate")
TOKENIZER = tiny_tokenizer()
EXAMPLES = (["The morning was", "A woman"], [" calm.", " sings in the park"], [" cold.", " cries"])
CPU = torch.device("cpu")
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(params=["cpu", "disk"])
def offloaded(request, tmp_path):
    model = FAMILIES["llama"]()
    if request.param == "cpu":
        accelerate.cpu_offload(model, execution_device=CPU)
    else:
        accelerate.disk_offload(model, str(tmp_path), execution_device=CPU)
    assert all(p.device.type == "meta" for p in model.parameters())
    return model


def test_offloaded_weights_give_what_weights_in_memory_give(offloaded):
    plain = build("llama")
    assert adapter_for(offloaded).device == CPU
    for n in (1, 2):  # a pair that is alone runs without a pack
        ours, truth = (
            completion_logprobs(m, EXAMPLES[0][:n], EXAMPLES[1][:n], TOKENIZER) for m in (offloaded, plain)
        )
        torch.testing.assert_close(ours.sums, truth.sums, **CLOSE)
    ours, truth = (caa_vectors(m, *EXAMPLES, [1, N_LAYERS], TOKENIZER) for m in (offloaded, plain))
    assert ours.allclose(truth, **CLOSE)
    vector = SteeringVector({1: torch.ones(D_MODEL), N_LAYERS: torch.ones(D_MODEL)})
    options = {"max_tokens": 4, "sampling_method": "greedy", "vector": vector, "strength": 2.0}
    ours, truth = (generate(m, TOKENIZER, "The morning", **options) for m in (offloaded, plain))
    assert ours == truth
    data = [TrainingDatapoint("The morning was", dst_completions=[" calm."])]
    ours, truth = (
        optimize_vector(m, data, 2, tokenizer=TOKENIZER, max_iters=2, lr=0.1, seed=0)[0]
        for m in (offloaded, plain)
    )
    torch.testing.assert_close(ours, truth, **CLOSE)


def test_the_unembedding_is_not_computed_from_weights_that_are_not_there(offloaded):
    adapter = adapter_for(offloaded)
    assert not adapter.unembeds and adapter_for(build("llama")).unembeds
    assert not unembedding_agrees(adapter)


def test_flags_are_put_back_on_weights_that_are_other_objects_after_a_call(offloaded):
    offloaded.model.embed_tokens.weight.requires_grad_(False)
    before = {name: p.requires_grad for name, p in offloaded.named_parameters()}
    assert set(before.values()) == {True, False}
    caa_vectors(offloaded, *EXAMPLES, [1], TOKENIZER)
    assert {name: p.requires_grad for name, p in offloaded.named_parameters()} == before


def test_a_model_without_weights_is_refused_before_anything_runs():
    model, called = FAMILIES["llama"]().to("meta"), []
    model.register_forward_pre_hook(lambda *_: called.append(1))
    for act in (
        lambda: completion_logprobs(model, ["The morning was"], [" calm."], TOKENIZER),
        lambda: caa_vectors(model, *EXAMPLES, [1], TOKENIZER),
        lambda: generate(model, TOKENIZER, "The morning", max_tokens=2),
    ):
        with pytest.raises(ValidationError, match="on the meta device, and nothing loads them"):
            act()
    assert not called
