"""What a model keeps of the library: nothing that holds it, and no steering that can't be taken off again."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import D_MODEL, FAMILIES, n_hooks, tiny_tokenizer
from torch import Tensor, nn

import mechanex
from mechanex.engine.caa import caa_vectors
from mechanex.engine.generate import generate
from mechanex.engine.hooks import Intervention, SteeringPlan, positions
from mechanex.engine.intervention import Edit
from mechanex.engine.models import adapter_for
from mechanex.engine.score import completion_logprobs
from mechanex.errors import MechanexError, ValidationError
from mechanex.utils.hooks import hf_hooks_contextmanager, make_steering_hook_hf
from mechanex.utils.steering_opt import (
    TrainingDatapoint,
    optimize_vector,
    optimize_vector_minibatch_hf,
    optimize_vectors,
)

IDS = torch.arange(2, 14).view(2, 6)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    return found


def plan(seed: int = 0, **where: Any) -> SteeringPlan:
    vector = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(seed))
    return SteeringPlan([Intervention(1, Edit.add(vector), **where)])


def extract(model: nn.Module) -> None:
    caa_vectors(
        model,
        ["The morning was", "A woman"],
        [" calm.", " opened"],
        [" cold", " cries"],
        [1],
        tiny_tokenizer(),
    )


def score(model: nn.Module) -> None:
    completion_logprobs(model, ["The morning was"], [" calm."], tokenizer=tiny_tokenizer())


def write(model: nn.Module) -> None:
    generate(model, tiny_tokenizer(), "The morning was", max_tokens=3)


def steer(model: nn.Module) -> None:
    with plan(tokens=slice(-2, None)).apply(model):
        logits(model)
    with hf_hooks_contextmanager(model, [(1, make_steering_hook_hf(torch.ones(D_MODEL)))]):
        logits(model)


def lose_a_handle(model: nn.Module) -> None:
    plan(rows=[0]).apply(model)
    mechanex.reset(model)


def stay_steered(model: nn.Module) -> None:
    plan(rows=[0], tokens=slice(-2, None)).apply(model)
    logits(model)
    model.generate(IDS, max_new_tokens=2, do_sample=False)


def optimize(model: nn.Module, **options: Any) -> None:
    data = [TrainingDatapoint("The morning was", dst_completions=[" calm."], src_completions=[" cold"])]
    optimize_vector(model, data, tokenizer=tiny_tokenizer(), **({"layer": 2, "max_iters": 2} | options))


def optimize_with_noise(model: nn.Module) -> None:
    optimize(model, noise_scale=0.1, do_tangent_space_noise=True, vector_clamp=1.0)


def optimize_from_the_end(model: nn.Module) -> None:
    optimize(model, layer=[1, 4])


def optimize_several(model: nn.Module) -> None:
    data = [TrainingDatapoint("The morning was", dst_completions=[" calm."])]
    jobs = [{"datapoints": data, "layer": layer, "max_iters": 2} for layer in (1, 2)]
    optimize_vectors(model, jobs, tokenizer=tiny_tokenizer())


def optimize_on_minibatches(model: nn.Module) -> None:
    optimize_vector_minibatch_hf(
        model,
        tiny_tokenizer(),
        ["The morning was", "A woman"],
        2,
        dst_completions=[" calm."],
        minibatch_size=1,
        max_iters=2,
    )


def look(model: nn.Module) -> None:
    adapter_for(model).findings["seen"] = True


OPTIMIZE = [optimize, optimize_with_noise, optimize_from_the_end, optimize_several, optimize_on_minibatches]


@pytest.mark.parametrize("use", [look, extract, score, write, steer, lose_a_handle, stay_steered, *OPTIMIZE])
def test_a_model_goes_when_its_last_name_goes(use: Callable[[nn.Module], None]):
    model = FAMILIES["llama"]()
    gone = weakref.ref(model)
    gc.collect()
    gc.disable()
    try:
        use(model)
        del model
        assert gone() is None, "something of the library still holds the model"
    finally:
        gc.enable()


def test_a_view_holds_its_model_and_what_was_found_out_outlives_the_view():
    adapter = adapter_for(FAMILIES["llama"]())
    assert logits(adapter.model).isfinite().all()
    adapter.findings["seen"], adapter.tokenizer, adapter.model_id = True, "one", "a name"
    model = adapter.model
    assert adapter_for(model) is adapter
    del adapter
    gc.collect()
    again = adapter_for(model)
    assert (again.findings["seen"], again.tokenizer, again.model_id) == (True, "one", "a name")


def test_a_copied_or_changed_model_starts_anew():
    model = FAMILIES["llama"]()
    adapter_for(model).findings["seen"] = True
    for other in (copy.deepcopy(model), copy.copy(model)):
        assert "seen" not in adapter_for(other).findings
    model.model.layers = nn.ModuleList(list(model.model.layers)[:-1])
    assert "seen" not in adapter_for(model).findings


@pytest.mark.parametrize("where", [{}, {"tokens": slice(-2, None)}, {"rows": [1]}])
def test_reset_takes_off_steering_whose_handle_is_lost(where):
    model = FAMILIES["llama"]()
    plain, before = logits(model), n_hooks(model)
    plan(**where).apply(model)
    handle = plan(1).apply(model)
    assert not torch.allclose(logits(model), plain, atol=1e-3)
    mechanex.reset(model)
    assert n_hooks(model) == before
    assert torch.equal(logits(model), plain)
    handle.remove()
    with plan(2, **where).apply(model), positions(model):
        assert not torch.allclose(logits(model), plain, atol=1e-3)
    assert torch.equal(logits(model), plain)


def test_reset_takes_an_adapter_and_leaves_hooks_of_others():
    model, seen = FAMILIES["gpt2"](), []
    model.transformer.h[1].register_forward_hook(lambda *_: seen.append(1))
    plain = logits(model)
    plan().apply(model)
    mechanex.reset(adapter_for(model))
    assert torch.equal(logits(model), plain)
    assert len(seen) == 2


def test_a_steered_models_copy_is_reset_by_itself():
    model = FAMILIES["llama"]()
    plain = logits(model)
    handle = plan().apply(model)
    twin = copy.deepcopy(model)
    steered = logits(model)
    assert torch.equal(logits(twin), steered)
    mechanex.reset(twin)
    assert torch.equal(logits(twin), plain)
    assert torch.equal(logits(model), steered)
    handle.remove()
    assert torch.equal(logits(model), plain)


def test_reset_without_a_model_is_of_the_loaded_one():
    client = mechanex.Mechanex()
    with pytest.raises(MechanexError, match=r"reset\(model\)"):
        client.reset()
    model = FAMILIES["llama"]()
    client.set_local_model(model, tiny_tokenizer())
    plain = logits(model)
    plan().apply(model)
    client.reset()
    assert torch.equal(logits(model), plain)
    with pytest.raises(ValidationError, match="Hugging Face or TransformerLens model"):
        client.reset("mx-tiny")


def test_a_forward_that_a_module_had_of_its_own_is_called_and_comes_back():
    model = FAMILIES["llama"]()
    block, calls = model.model.layers[1], []
    inner = block.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return inner(*args, **kwargs)

    block.forward = counted
    with plan().apply(model):
        logits(model)
        assert calls == [1]
    assert block.forward is counted
