"""Where a model is read and edited: the stream entering each block, and layer n, the stream leaving the last one."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from families import BOS, D_MODEL, FAMILIES, N_LAYERS, build, tiny_tokenizer

from mechanex import SteeringVector, ValidationError
from mechanex.engine.caa import caa_vectors
from mechanex.engine.decode.request import Steer
from mechanex.engine.decode.steering import RowSteering, Span
from mechanex.engine.directions import answer_means, pca_vectors
from mechanex.engine.hooks import Intervention, SteeringPlan
from mechanex.engine.intervention import Edit, EditTable
from mechanex.engine.models import adapter_for
from mechanex.engine.score import completion_logprobs
from mechanex.utils.steering_opt import (
    TrainingDatapoint,
    hf_hooks_contextmanager,
    make_abl_mat,
    make_activs_hook_hf,
    make_steering_hook_hf,
    optimize_vector,
)

IDS = torch.tensor([[BOS, 9, 30, 71, 12, 8, 45], [BOS, 101, 7, 7, 250, 33, 18]])
TUPLES = ("gptj", "bloom", "falcon")  # some versions return tuples from their blocks


def vector(seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(D_MODEL, generator=torch.Generator().manual_seed(seed))


def logits_of(model, ids=IDS):
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def before_the_norm(model, *, shift=None, ids=IDS):
    """[B, T, d] what the model's own norm is given, and the logits; by hooks of our own on the norm, not on blocks."""
    (norm,) = adapter_for(model)._tail[:1]
    seen = []

    def note(_, args):
        seen.append(args[0])
        return None if shift is None else (args[0] + shift,)

    handle = norm.register_forward_pre_hook(note)
    logits = logits_of(model, ids)
    handle.remove()
    return seen[0], logits


@pytest.mark.parametrize("name", FAMILIES)
def test_layer_n_is_what_the_final_norm_gets(name):
    model, v = build(name), vector()
    truth, shifted = before_the_norm(model, shift=v)
    seen = []
    with hf_hooks_contextmanager(model, [(N_LAYERS, make_activs_hook_hf(seen))]):
        logits_of(model)
    assert torch.equal(seen[0], truth)
    with SteeringPlan([Intervention(N_LAYERS, Edit.add(v))]).apply(model):
        torch.testing.assert_close(logits_of(model), shifted, rtol=1e-5, atol=1e-5)
    with hf_hooks_contextmanager(model, [(N_LAYERS, make_steering_hook_hf(v))]):
        torch.testing.assert_close(logits_of(model), shifted, rtol=1e-5, atol=1e-5)
    with SteeringVector({N_LAYERS: v}).apply(model, 1.0):
        torch.testing.assert_close(logits_of(model), shifted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", *TUPLES])
def test_ablating_at_every_layer_leaves_nothing_before_the_norm(name):
    model, v = build(name), vector(1)
    direction = v / v.norm()
    everywhere = range(N_LAYERS + 1)
    with SteeringPlan([Intervention(layer, Edit.ablate(v)) for layer in everywhere]).apply(model):
        left, _ = before_the_norm(model)
    assert float((left @ direction).abs().max()) <= 1e-5 * float(left.norm(dim=-1).max())
    hook = make_steering_hook_hf(0, make_abl_mat(v))
    with hf_hooks_contextmanager(model, [(layer, hook) for layer in everywhere]):
        left, _ = before_the_norm(model)
    assert float((left @ direction).abs().max()) <= 1e-5 * float(left.norm(dim=-1).max())


def test_positions_and_rows_hold_at_layer_n_under_a_cache():
    model, v = build("llama"), vector(2, 3.0)
    plan = SteeringPlan([Intervention(N_LAYERS, Edit.add(v), tokens=slice(6, 8))])
    with plan.apply(model):
        cached = model.generate(IDS, max_new_tokens=4, do_sample=False)
        whole = logits_of(model, cached)
    plain = logits_of(model, cached)
    changed = (whole - plain).abs().amax(-1) > 1e-4
    assert changed[0].tolist() == [6 <= place < 8 for place in range(cached.shape[1])]
    assert torch.equal(cached[:, 7:], whole[:, 6:-1].argmax(-1))
    with SteeringPlan([Intervention(N_LAYERS, Edit.add(v), rows=[1])]).apply(model):
        rows = logits_of(model)
    assert torch.equal(rows[0], logits_of(model)[0]) and not torch.allclose(rows[1], logits_of(model)[1])


def test_negative_layers_end_at_the_last_blocks_input_and_n_is_the_highest():
    model = build("llama")
    adapter = adapter_for(model)
    assert [adapter.layer_index(n) for n in (-N_LAYERS, -1, 0, N_LAYERS)] == [0, N_LAYERS - 1, 0, N_LAYERS]
    for layer in (N_LAYERS + 1, -N_LAYERS - 1):
        with pytest.raises(ValidationError, match="4 for the stream that leaves the last one"):
            SteeringVector({0: vector()}).plan(model) and adapter.layer_index(layer)


def test_a_users_own_pre_hook_of_any_form_serves_at_layer_n():
    model, v = build("llama"), vector()
    _, shifted = before_the_norm(model, shift=v)
    forms = (
        lambda module, args: args[0] + v,
        lambda module, args: (args[0] + v,),
        lambda module, args, kwargs: ((args[0] + v,), kwargs),
    )
    for hook in forms:
        with hf_hooks_contextmanager(model, [(N_LAYERS, hook)]):
            torch.testing.assert_close(logits_of(model), shifted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits_of(model), shifted)


def test_other_directions_are_read_at_layer_n():
    model, tokenizer = build("gpt2"), tiny_tokenizer()
    texts = (["The morning was", "A woman"], [" calm.", " opened"], [" cold and quiet.", " train"])
    found = pca_vectors(model, *texts, [N_LAYERS], tokenizer)
    assert list(found) == [N_LAYERS]
    ids = [tokenizer(p + a)["input_ids"] for p, a in zip(*texts[:2], strict=True)]
    cuts = [len(tokenizer(p)["input_ids"]) for p in texts[0]]
    pairs = [(i[:cut], i[cut:]) for i, cut in zip(ids, cuts, strict=True)]
    means = answer_means(adapter_for(model), pairs, [N_LAYERS])[N_LAYERS]
    for row, (i, cut) in enumerate(zip(ids, cuts, strict=True)):
        truth, _ = before_the_norm(model, ids=torch.tensor([i]))
        torch.testing.assert_close(means[row].float(), truth[0, cut:].mean(0), rtol=1e-4, atol=1e-4)


def test_rows_of_a_server_are_steered_at_layer_n_each_its_own_way():
    model, v = build("llama"), vector(4)
    _, shifted = before_the_norm(model, shift=v)
    steering = RowSteering(adapter_for(model))
    steered, plain = (Steer(N_LAYERS, Edit.add(v)),), ()
    steering.prepare([Span(plain, 7, 0), Span(steered, 7, 0)], 7)
    found = logits_of(model)
    steering.detach()
    torch.testing.assert_close(found, torch.stack([logits_of(model)[0], shifted[1]]), rtol=1e-5, atol=1e-5)


# Several streams side by side


def _several_streams(name):
    """Tiny models of the families of the installed transformers whose blocks pass on more than one stream."""
    shared = {
        "vocab_size": 384,
        "hidden_size": D_MODEL,
        "intermediate_size": 96,
        "num_hidden_layers": N_LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "max_position_embeddings": 256,
    }
    altup = {
        "intermediate_size": [96] * N_LAYERS,
        "layer_types": ["full_attention"] * N_LAYERS,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 384,
        "laurel_rank": 4,
        "num_kv_shared_layers": 0,
        "activation_sparsity_pattern": [0.0] * N_LAYERS,
    }
    config, model, more = {
        "gemma3n": ("Gemma3nTextConfig", "Gemma3nForCausalLM", altup),
        "deepseek_v4": ("DeepseekV4Config", "DeepseekV4ForCausalLM", {}),
        "hy_v4": ("HYV4Config", "HYV4ForCausalLM", {}),
    }[name]
    if not hasattr(transformers, model):
        pytest.skip(f"this transformers has no {model}")
    torch.manual_seed(0)
    return getattr(transformers, model)(getattr(transformers, config)(**shared | more)).eval()


@pytest.mark.parametrize("name", ["gemma3n", "deepseek_v4", "hy_v4"])
@pytest.mark.parametrize("layer", [1, N_LAYERS])
def test_models_of_several_streams_are_refused_before_anything_is_edited(name, layer):
    model, tokenizer, v = _several_streams(name), tiny_tokenizer(), vector(0, 5.0)
    plain, says = logits_of(model), "keeps several streams side by side"
    with pytest.raises(ValidationError, match=says), SteeringVector({layer: v}).apply(model):
        model(IDS)
    hook = make_steering_hook_hf(v)
    with pytest.raises(ValidationError, match=says), hf_hooks_contextmanager(model, [(layer, hook)]):
        model(IDS)
    examples = (["The morning was"], [" calm."], [" cold."])
    with pytest.raises(ValidationError, match=says):
        caa_vectors(model, *examples, [layer], tokenizer)
    with pytest.raises(ValidationError, match=says):
        optimize_vector(
            model,
            [TrainingDatapoint("The morning was", dst_completions=[" calm."])],
            layer,
            tokenizer=tokenizer,
            max_iters=1,
            lr=0.1,
        )
    assert torch.equal(logits_of(model), plain)
    found = completion_logprobs(model, ["The morning was"], [" calm."], tokenizer)  # no stream is touched
    assert float(found.sums[0]) < 0


def test_a_hidden_state_of_another_width_is_several_streams_too():
    model = FAMILIES["llama"]()
    block = model.model.layers[1]
    block.register_forward_pre_hook(lambda module, args: (torch.cat([args[0], args[0]], -1), *args[1:]))
    with (
        pytest.raises(ValidationError, match=r"pass on \[2, 7, 96\]"),
        SteeringVector({1: vector()}).apply(model),
    ):
        model(IDS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bound_table_edits_as_the_table_does(dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    edits = [Edit.clamp(torch.randn(48, generator=draw), 2.0), Edit.add(torch.randn(48, generator=draw))]
    gated = Edit.add(torch.ones(48)).gated("sigmoid", torch.ones(48))
    for chains in ([[edits[0]], [edits[1]]], [edits, [gated]], [[gated, edits[0]], [edits[1]]]):
        table = EditTable.of_chains(chains)
        rows = torch.tensor([[0], [-1], [1]], dtype=torch.int32)
        bound = table.bound(rows)
        with torch.no_grad():
            for _ in range(3):
                hidden = torch.randn(3, 1, 48, generator=draw).to(dtype)
                before = hidden.clone()
                torch.testing.assert_close(bound(hidden), table.apply(hidden, rows), rtol=0, atol=0)
                assert torch.equal(hidden, before)
            other = torch.randn(3, 1, 48, generator=draw).double()
            torch.testing.assert_close(bound(other), table.apply(other, rows), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_is_bound_takes_hidden_states_however_they_lie_in_memory(dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    table = EditTable.of_chains(
        [[Edit.clamp(torch.randn(48, generator=draw), 2.0)], [Edit.add(torch.ones(48))]]
    )
    rows = torch.tensor([[0, 1], [-1, 0]], dtype=torch.int32)
    bound = table.bound(rows)
    spread = torch.randn(2, 48, 2, generator=draw).to(dtype).transpose(1, 2)
    negated = torch.view_as_complex(torch.randn(2, 2, 48, 2, generator=draw)).conj().imag.to(dtype)
    lazily = torch.view_as_complex(torch.randn(2, 2, 48, 2, generator=draw)).conj().imag
    with torch.no_grad():
        for hidden in (spread.contiguous(), spread, negated, *([lazily] if dtype is torch.float32 else [])):
            for _ in range(2):
                edited = bound(hidden)
                assert edited.is_contiguous()
                torch.testing.assert_close(edited, table.apply(hidden.resolve_neg(), rows), rtol=0, atol=0)
    with pytest.raises(ValidationError, match="rows"), torch.no_grad():
        outside = EditTable.of_chains([[Edit.clamp(torch.ones(48), 2.0)]]).bound(rows)
        outside(spread.contiguous())


@pytest.mark.parametrize(
    ("name", "path", "runs"), [("llama", "model.layers", 4), ("gpt2", "transformer.h", 5)]
)
def test_blocks_that_are_listed_and_not_run_are_no_layers(name, path, runs):
    """Checkpoints that predict several tokens at once append blocks to the list that a plain pass leaves out."""
    model = FAMILIES[name]()
    blocks = model.get_submodule(path)
    blocks.append(copy.deepcopy(blocks[-1]))
    adapter, seen = adapter_for(model), []
    assert adapter.n_layers == runs and adapter_for(model) is adapter
    ids = torch.tensor([[1, 9, 30]])
    handle = adapter.on_residual(adapter.n_layers, lambda hidden: seen.append(hidden))
    with torch.no_grad():
        logits = model(ids).logits
        handle.remove()
        torch.testing.assert_close(adapter.unembedding.logits(adapter.finish(seen[0])), logits)
    model.get_input_embeddings().weight = torch.nn.Parameter(torch.zeros(0, 48))
    del adapter
    with pytest.raises(ValidationError, match=r"lists 5 decoder layers.*Error: .*num_hidden_layers"):
        adapter_for(model)
