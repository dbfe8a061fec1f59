"""TransformerLens models are steered and read at the same sites, with the same results, as plain models."""

from __future__ import annotations

import subprocess
import sys
import types
from functools import cache

import pytest
import torch
from families import BOS, D_MODEL, EOS, FAMILIES, N_LAYERS, N_VOCAB, PAD, build, tiny_tokenizer
from torch import nn

from mechanex.engine.caa import caa_vectors
from mechanex.engine.forward import packs_for, scored_logits
from mechanex.engine.hooks import Intervention, SteeringPlan
from mechanex.engine.intervention import Edit
from mechanex.engine.models import adapter_for, lens
from mechanex.engine.models.transformer_lens import is_transformer_lens
from mechanex.engine.passes import Resumed
from mechanex.errors import ValidationError
from mechanex.utils.steering_opt import (
    hf_hooks_contextmanager,
    make_steering_hook_hf,
    make_steering_hook_tflens,
)

needs_lens = pytest.mark.skipif(
    not lens.installed(), reason="transformer-lens (the lens extra) is not installed"
)
IDS = torch.tensor([[BOS, 9, 30, 71, 12, 8, 45], [BOS, 101, 7, 7, 250, 33, 18]])
SOME = ("llama", "gpt2", "gptj", "gemma2", "mamba")
# Bridges compute attention in their own order: equal to rounding only.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def fresh_bridge(name: str):
    return lens.wrap(FAMILIES[name](), name, tiny_tokenizer())


bridge_of = cache(fresh_bridge)  # shared by tests that leave the model as it is


def vector(seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(D_MODEL, generator=torch.Generator().manual_seed(seed))


def residuals(model, run) -> list[torch.Tensor]:
    """The stream at each layer, and what leaves the last, while ``run`` runs."""
    adapter, seen = adapter_for(model), []
    handles = [adapter.on_residual(layer, seen.append) for layer in range(adapter.n_layers + 1)]
    with torch.no_grad():
        run()
    for handle in handles:
        handle.remove()
    return seen


def two_edits() -> SteeringPlan:
    """An addition low down, and an ablation of the last two streams."""
    ablated = [Intervention(layer, Edit.ablate(vector(2))) for layer in (N_LAYERS - 1, N_LAYERS)]
    return SteeringPlan([Intervention(1, Edit.add(vector(1))), *ablated])


@needs_lens
@pytest.mark.parametrize("name", FAMILIES)
def test_residual_and_logits_equal_those_of_the_hugging_face_model(name):
    plain, bridge = build(name), bridge_of(name)
    ours = residuals(bridge, lambda: bridge(IDS))
    truth = residuals(plain, lambda: plain(IDS))
    assert len(ours) == len(truth) == N_LAYERS + 1
    for layer, (a, b) in enumerate(zip(ours, truth, strict=True)):
        torch.testing.assert_close(a, b, **CLOSE, msg=lambda m, layer=layer: f"layer {layer}: {m}")
    with torch.no_grad():
        torch.testing.assert_close(bridge(IDS), plain(IDS).logits, **CLOSE)


@needs_lens
@pytest.mark.parametrize("name", FAMILIES)
def test_steered_logits_equal_whichever_way_the_model_is_called(name):
    plain, bridge = build(name), bridge_of(name)
    with torch.no_grad():
        unsteered = bridge(IDS)
        with two_edits().apply(plain):
            truth = plain(IDS).logits
        with two_edits().apply(bridge):
            torch.testing.assert_close(bridge(IDS), truth, **CLOSE)
            torch.testing.assert_close(bridge.original_model(IDS).logits, truth, **CLOSE)
        assert not torch.allclose(truth, unsteered, atol=1e-2)
        assert torch.equal(bridge(IDS), unsteered)


@pytest.mark.usefixtures("fitting_bridges")
@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("padded", [False, True])
def test_generation_under_a_cache_is_steered_alike_by_position(name, padded):
    plain, bridge = build(name), bridge_of(name)
    ids, mask = IDS.clone(), torch.ones_like(IDS)
    if padded:
        ids[0, :3], mask[0, :3] = PAD, 0
    plan = SteeringPlan([Intervention(1, Edit.add(vector(3, 6.0)), tokens=slice(-2, 9))])
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    unsteered = plain.generate(ids, **options)
    with plan.apply(plain):
        truth = plain.generate(ids, **options)
    with plan.apply(bridge):
        assert torch.equal(bridge.original_model.generate(ids, **options), truth)
        if not padded:  # the bridge's own generate takes no mask
            ours = bridge.generate(ids, max_new_tokens=6, do_sample=False, stop_at_eos=False, verbose=False)
            assert torch.equal(ours, truth)
    assert not torch.equal(truth, unsteered)


@needs_lens
@pytest.mark.parametrize("name", SOME)
def test_packed_and_resumed_passes_equal_the_plain_model(name):
    plain, bridge = build(name), bridge_of(name)
    pairs = [([5, 9, 30], [8, 2]), ([5, 9, 30], [17]), ([44, 7], [12, 90, 31, 6]), ([20] * 8, [3])]
    for model in (plain, bridge):
        adapter = adapter_for(model)
        (pack,) = packs_for(adapter, pairs, batch_tokens=4096)
        with torch.no_grad():
            logits = scored_logits(adapter, pack)
            resumed = scored_logits(adapter, pack, Resumed(adapter, pack, 2).scored())
            torch.testing.assert_close(resumed, logits, **CLOSE)
            for i, (prompt, completion) in enumerate(pairs):
                alone = plain(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
                torch.testing.assert_close(logits[pack.pair == i], alone, **CLOSE)


@needs_lens
def test_vectors_from_examples_are_the_same_for_both():
    texts = (
        ["The weather was", "She said that"],
        [" warm and bright.", " all was well."],
        [" cold.", " it failed."],
    )
    tokenizer = tiny_tokenizer()
    ours = caa_vectors(bridge_of("llama"), *texts, layers=[0, 2, 3])  # the bridge carries its tokenizer
    truth = caa_vectors(build("llama"), *texts, layers=[0, 2, 3], tokenizer=tokenizer)
    for layer in (0, 2, 3):
        torch.testing.assert_close(ours[layer], truth[layer], **CLOSE)


@needs_lens
def test_gradients_of_the_vectors_are_the_same_for_both():
    def gradients(model, run):
        first, second = vector(1).requires_grad_(), vector(2).requires_grad_()
        plan = SteeringPlan([Intervention(1, Edit.add(first)), Intervention(3, Edit.add(second))])
        with plan.apply(model):
            return torch.autograd.grad(run().logsumexp(-1).sum(), (first, second))

    plain, bridge = build("qwen3"), bridge_of("qwen3")
    ours, truth = gradients(bridge, lambda: bridge(IDS)), gradients(plain, lambda: plain(IDS).logits)
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


@needs_lens
def test_the_documented_hooks_agree_between_hook_points_and_layers():
    bridge, v, matrix = bridge_of("llama"), vector(), torch.eye(D_MODEL) * -0.5
    with torch.no_grad():
        through_point = bridge.run_with_hooks(
            IDS, fwd_hooks=[("blocks.2.hook_resid_pre", make_steering_hook_tflens(v, matrix))]
        )
        with hf_hooks_contextmanager(bridge, [(2, make_steering_hook_hf(v, matrix))]):
            torch.testing.assert_close(bridge(IDS), through_point, **CLOSE)


@needs_lens
def test_steering_lives_with_transformer_lens_own_tools():
    bridge, v = bridge_of("llama"), vector()
    plan = SteeringPlan([Intervention(2, Edit.add(v))])
    with torch.no_grad():
        unsteered = bridge(IDS)
        _, before = bridge.run_with_cache(IDS)
        with plan.apply(bridge):
            steered = bridge(IDS)
            _, cache = bridge.run_with_cache(IDS)
            bridge.reset_hooks()
            assert torch.equal(bridge(IDS), steered), "reset_hooks() must not end steering silently"
        assert torch.equal(bridge(IDS), unsteered)
    torch.testing.assert_close(cache["blocks.2.hook_resid_pre"], before["blocks.2.hook_resid_pre"] + v)
    assert torch.equal(cache["blocks.1.hook_resid_pre"], before["blocks.1.hook_resid_pre"])


@needs_lens
def test_compatibility_mode_keeps_sites_and_steering():
    """Weights are folded then and logits move by a constant per row; an RMSNorm model's residual stays."""
    plain, bridge = build("llama"), fresh_bridge("llama")
    bridge.enable_compatibility_mode(disable_warnings=True)
    with torch.no_grad(), two_edits().apply(plain), two_edits().apply(bridge):
        truth, ours = plain(IDS).logits.log_softmax(-1), bridge(IDS).log_softmax(-1)
    torch.testing.assert_close(ours, truth, **CLOSE)


@needs_lens
def test_wrapping_keeps_the_tokenizer_and_encodes_alike():
    tokenizer = tiny_tokenizer()
    settings = dict(tokenizer.init_kwargs)
    bridge = lens.wrap(FAMILIES["llama"](), "some/name", tokenizer)
    text = "The train to Paris leaves at seven."
    assert bridge.tokenizer(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert bridge.to_tokens(text)[0].tolist() == tokenizer(text)["input_ids"]
    assert tokenizer.init_kwargs == settings and tokenizer is not bridge.tokenizer
    assert adapter_for(bridge).model_id == "some/name"


@needs_lens
def test_a_bridge_without_a_transformers_model_is_refused():
    from transformer_lens import TransformerBridgeConfig
    from transformer_lens.model_bridge import TransformerBridge

    config = {"n_layers": 1, "d_model": 8, "n_ctx": 16, "d_head": 4, "n_heads": 2, "d_vocab": 20, "d_mlp": 16}
    native = TransformerBridge.boot_native(
        TransformerBridgeConfig(**config, act_fn="gelu", normalization_type="LN", device="cpu")
    )
    with pytest.raises(ValidationError, match=r"mechanex\.load"):
        adapter_for(native)


def test_telling_models_apart_imports_nothing():
    code = (
        "import sys, torch\n"
        "from mechanex.engine.models.transformer_lens import is_transformer_lens\n"
        "assert not is_transformer_lens(torch.nn.Linear(2, 2))\n"
        "assert 'transformer_lens' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hook_resid_pre, self.hook_resid_post = nn.Identity(), nn.Identity()
        self.mix = nn.Linear(D_MODEL, D_MODEL)

    def forward(self, resid_pre, past_kv_cache_entry=None, attention_mask=None):
        x = self.hook_resid_pre(resid_pre)
        keys = x if past_kv_cache_entry is None else past_kv_cache_entry.append(x)
        return self.hook_resid_post(x + torch.tanh(self.mix(x + keys.cumsum(1)[:, -x.shape[1] :])))


class _Past:
    def __init__(self) -> None:
        self.past_keys = torch.empty(1, 0, D_MODEL)

    def append(self, x):
        self.past_keys = torch.cat([self.past_keys, x], 1)
        return self.past_keys


class _Unembed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.W_U, self.b_U = nn.Parameter(torch.randn(D_MODEL, N_VOCAB)), nn.Parameter(torch.randn(N_VOCAB))

    def forward(self, x):
        return x @ self.W_U + self.b_U


class HookedTransformer(nn.Module):
    """The shape of TransformerLens 3's model: parts, arguments, and a generate() that skips model hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.cfg = types.SimpleNamespace(
            d_vocab=N_VOCAB,
            d_model=D_MODEL,
            n_layers=N_LAYERS,
            n_ctx=64,
            model_name="old",
            output_logits_soft_cap=30.0,
        )
        self.embed = nn.Embedding(N_VOCAB, D_MODEL)
        self.blocks = nn.ModuleList(_Block() for _ in range(N_LAYERS))
        self.ln_final, self.unembed, self.tokenizer = nn.LayerNorm(D_MODEL), _Unembed(), None

    def forward(self, input, return_type="logits", attention_mask=None, past_kv_cache=None):
        x = self.embed(input)
        for i, block in enumerate(self.blocks):
            entry = None if past_kv_cache is None else past_kv_cache[i]
            x = block(x, past_kv_cache_entry=entry, attention_mask=attention_mask)
        return 30 * torch.tanh(self.unembed(self.ln_final(x)) / 30)

    def generate(self, ids, n, use_past_kv_cache=True):
        cache, fed = [_Past() for _ in self.blocks], ids
        for _ in range(n):
            logits = self.forward(fed, past_kv_cache=cache if use_past_kv_cache else None)
            new = logits[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, new], 1)
            fed = new if use_past_kv_cache else ids
        return ids


HookedTransformer.__module__ = "transformer_lens.HookedTransformer"


@pytest.fixture
def hooked() -> HookedTransformer:
    torch.manual_seed(4)
    return HookedTransformer().eval()


def test_a_hooked_transformer_of_version_3_is_steered_at_its_hook_points(hooked):
    assert is_transformer_lens(hooked)
    adapter, v = adapter_for(hooked), vector()
    assert (adapter.n_layers, adapter.d_model, adapter.model_id) == (N_LAYERS, D_MODEL, "old")
    with torch.no_grad():
        before = residuals(hooked, lambda: hooked(IDS))
        with SteeringPlan([Intervention(2, Edit.add(v))]).apply(hooked):
            after = residuals(hooked, lambda: hooked(IDS))
        torch.testing.assert_close(after[2], before[2] + v)
        assert torch.equal(after[1], before[1]) and not torch.equal(after[3], before[3])


@pytest.mark.parametrize("cached", [True, False])
def test_a_hooked_transformer_is_steered_by_position_while_it_generates(hooked, cached):
    ids, v = IDS[:1], vector(5, 4.0)

    def by_hand(_module, _inputs, x):
        x = x.clone()
        x[:, 5:9] += v
        return x

    handle = hooked.blocks[1].hook_resid_pre.register_forward_hook(by_hand)
    with torch.no_grad():
        truth = hooked.generate(ids, 5, use_past_kv_cache=False)
        handle.remove()
        with SteeringPlan([Intervention(1, Edit.add(v), tokens=slice(-2, 9))]).apply(hooked):
            assert torch.equal(hooked.generate(ids, 5, use_past_kv_cache=cached), truth)
        assert not torch.equal(hooked.generate(ids, 5), truth)


def test_scores_of_a_hooked_transformer_come_from_padded_rows(hooked):
    adapter = adapter_for(hooked)
    pairs = [([5, 9, 30], [8, EOS]), ([44], [12, 90, 31])]
    with torch.no_grad():
        for pack in packs_for(adapter, pairs):
            logits = scored_logits(adapter, pack)
            for i, (prompt, completion) in enumerate(pairs):
                alone = hooked(torch.tensor([prompt + completion]))[0, len(prompt) - 1 : -1]
                torch.testing.assert_close(logits[pack.pair == i], alone, **CLOSE)


def test_a_hooked_transformer_says_what_it_can_not_do(hooked):
    inner = adapter_for(hooked).hf_model
    with pytest.raises(TypeError, match="position_ids"):
        inner(IDS, position_ids=IDS)
