"""The documented hooks: what they do to x, where, and what they leave alone."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from families import D_MODEL, FAMILIES, N_LAYERS, SLIDING, build, n_hooks, sliding_family
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mechanex.engine.caches import returned_caches
from mechanex.engine.hooks import Intervention, SteeringPlan, positions
from mechanex.engine.intervention import Edit
from mechanex.errors import ValidationError
from mechanex.utils.steering_opt import (
    hf_hooks_contextmanager,
    make_abl_mat,
    make_activs_hook_hf,
    make_steering_hook_hf,
    make_steering_hook_tflens,
)

LAYER = 2
IDS = torch.tensor([[1, 9, 30, 71, 12, 8, 45]])


def vector(seed: int = 0) -> torch.Tensor:
    return torch.randn(D_MODEL, generator=torch.Generator().manual_seed(seed))


def logits(model, ids=IDS, **inputs):
    with torch.no_grad():
        return model(input_ids=ids, **inputs).logits


def residual(model, hooks=(), layer=LAYER, ids=IDS, **inputs):
    seen = []
    with hf_hooks_contextmanager(model, [*hooks, (layer, make_activs_hook_hf(seen))]):
        logits(model, ids, **inputs)
    return seen[0]


@pytest.mark.parametrize("name", FAMILIES)
def test_steering_adds_v_plus_mx_to_the_residual_entering_the_layer(name):
    model = build(name)
    v, m = vector(), torch.randn(D_MODEL, D_MODEL, generator=torch.Generator().manual_seed(1)) / 10
    x = residual(model)
    steered = residual(model, [(LAYER, make_steering_hook_hf(v, m))])
    torch.testing.assert_close(steered, x + v + x @ m.T, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(model), steered_logits(model, v), atol=1e-3)


def steered_logits(model, v, layer=LAYER, token=None, **inputs):
    with hf_hooks_contextmanager(model, [(layer, make_steering_hook_hf(v, token=token))]):
        return logits(model, **inputs)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("strength", [0.0, -3.0])
def test_a_zero_vector_gives_bit_identical_logits(name, strength):
    model = build(name)
    assert torch.equal(steered_logits(model, strength * torch.zeros(D_MODEL)), logits(model))


def test_what_was_recorded_below_the_edit_does_not_change():
    model = build("llama")
    seen = []
    hooks = [
        (LAYER, make_activs_hook_hf(seen)),
        (LAYER, make_steering_hook_hf(vector())),
        (LAYER, make_activs_hook_hf(seen)),
    ]
    with hf_hooks_contextmanager(model, hooks):
        logits(model)
    torch.testing.assert_close(seen[1], seen[0] + vector())
    assert torch.equal(seen[0], residual(model))


def test_hooks_on_one_layer_run_in_order():
    model = build("llama")
    double, add = make_steering_hook_hf(0, 1.0), make_steering_hook_hf(vector())
    x = residual(model)
    torch.testing.assert_close(residual(model, [(LAYER, double), (LAYER, add)]), 2 * x + vector())
    torch.testing.assert_close(residual(model, [(LAYER, add), (LAYER, double)]), 2 * (x + vector()))


def test_vector_and_matrix_may_be_numbers():
    model = build("llama")
    torch.testing.assert_close(
        residual(model, [(LAYER, make_steering_hook_hf(2, 0.5))]), 1.5 * residual(model) + 2
    )


def test_the_documented_clamp_sets_the_component_along_v():
    model = build("llama")
    v = vector()
    x = residual(model, [(LAYER, make_steering_hook_hf(5 * v, make_abl_mat(v)))])
    torch.testing.assert_close(x @ (v / v.norm()), (5 * v.norm()).expand(IDS.shape), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_arithmetic_is_float32_and_the_result_has_the_models_dtype(dtype):
    model = FAMILIES["llama"]().to(dtype)
    v, m = vector(), torch.randn(D_MODEL, D_MODEL, generator=torch.Generator().manual_seed(1))
    x, steered = residual(model), residual(model, [(LAYER, make_steering_hook_hf(v, m))])
    assert steered.dtype == dtype
    torch.testing.assert_close(steered, (x.float() + v + x.float() @ m.T).to(dtype), rtol=1e-2, atol=1e-3)


def test_gradients_are_true_through_several_layers():
    """Central differences in float64, steered at three layers at once (Llama's norm rounds to float32)."""
    model = FAMILIES["gpt2"]().double()
    v = vector().double().requires_grad_()

    def loss(v):
        hooks = [(layer, make_steering_hook_hf(v, make_abl_mat(v))) for layer in (0, 1, 3)]
        with hf_hooks_contextmanager(model, hooks):
            return model(input_ids=IDS).logits.log_softmax(-1)[0, -1, 5]

    (gradient,) = torch.autograd.grad(loss(v), v)
    with torch.no_grad():
        for i in (0, 7, D_MODEL - 1):
            step = torch.zeros(D_MODEL, dtype=torch.float64)
            step[i] = 1e-5
            difference = (loss(v + step) - loss(v - step)) / 2e-5
            torch.testing.assert_close(gradient[i], difference, rtol=1e-6, atol=1e-8)


TOKENS = [
    0,
    3,
    -1,
    -3,
    slice(2, None),
    slice(None, 4),
    slice(-2, None),
    slice(1, -1),
    slice(0, None, 2),
    slice(-4, -1, 2),
]


def wanted(token, total: int, prompt: int) -> list[int]:
    """Positions selected in a sequence of ``total`` tokens whose first ``prompt`` are the prompt."""
    if isinstance(token, int):
        return [token if token >= 0 else prompt + token]
    start = 0 if token.start is None else token.start if token.start >= 0 else max(0, prompt + token.start)
    stop = total if token.stop is None else token.stop if token.stop >= 0 else prompt + token.stop
    return list(range(start, min(stop, total), token.step or 1))


@pytest.mark.parametrize("token", TOKENS, ids=str)
def test_token_selects_absolute_positions(token):
    model = build("llama")
    x = residual(model)
    change = residual(model, [(LAYER, make_steering_hook_hf(vector(), token=token))]) - x
    edited = change.abs().sum(-1)[0].nonzero().flatten().tolist()
    assert edited == wanted(token, IDS.shape[1], IDS.shape[1])


def greedy(model, ids, steps, hook, *, use_cache, mask=None):
    """Token ids and last-token logits of each step of a hand-written decode loop."""
    out, cache, new = [], {}, ids
    mask = torch.ones_like(ids) if mask is None else mask
    stated = nullcontext() if use_cache else positions(model, prompt_tokens=ids.shape[1])
    with hf_hooks_contextmanager(model, [(LAYER, hook)]), stated, torch.no_grad():
        for _ in range(steps):
            places = (mask.cumsum(1) - 1).clamp(min=0)[:, -new.shape[1] :]
            extra = {} if model.config.model_type in ("bloom", "mpt") else {"position_ids": places}
            extra |= cache
            result = model(input_ids=new, attention_mask=mask, use_cache=use_cache, **extra)
            out.append(result.logits[:, -1])
            token = result.logits[:, -1:].argmax(-1)
            ids, mask = torch.cat([ids, token], 1), torch.cat([mask, torch.ones_like(token)], 1)
            cache, new = (returned_caches(result), token) if use_cache else ({}, ids)
    return ids, torch.stack(out)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma2", "bloom", "mpt", "gpt_neox", "falcon"])
@pytest.mark.parametrize(
    "token", [None, 3, -1, slice(-2, None), slice(8, None), slice(None, 9), slice(-3, -1)], ids=str
)
def test_cached_decode_equals_uncached(name, token):
    model = build(name)
    hook = make_steering_hook_hf(3 * vector(), token=token)
    cached_ids, cached = greedy(model, IDS, 5, hook, use_cache=True)
    ids, uncached = greedy(model, IDS, 5, make_steering_hook_hf(3 * vector(), token=token), use_cache=False)
    assert torch.equal(cached_ids, ids)
    torch.testing.assert_close(cached, uncached, rtol=1e-3, atol=1e-3)


def test_generate_of_left_padded_rows_equals_each_row_alone():
    for name in ("llama", "mamba"):
        model = build(name)
        rows = [IDS[0], IDS[0, 3:]]
        ids = torch.stack([torch.nn.functional.pad(r, (IDS.shape[1] - len(r), 0)) for r in rows])
        with hf_hooks_contextmanager(
            model, [(LAYER, make_steering_hook_hf(3 * vector(), token=slice(2, 9)))]
        ):
            together = model.generate(
                ids, attention_mask=(ids != 0).long(), max_new_tokens=6, min_new_tokens=6, do_sample=False
            )
            for row, found in zip(rows, together, strict=True):
                alone = model.generate(
                    row[None],
                    attention_mask=torch.ones_like(row[None]),
                    max_new_tokens=6,
                    min_new_tokens=6,
                    do_sample=False,
                )
                assert torch.equal(found[-6:], alone[0, -6:])


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma2", "bloom", "mpt"])
@pytest.mark.parametrize("token", [2, -1, slice(-2, None), slice(1, 9)], ids=str)
def test_left_padding_changes_nothing(name, token):
    model = build(name)
    rows = [IDS[0], IDS[0, :4], IDS[0, 2:5]]
    width = max(map(len, rows))
    ids = torch.stack([torch.nn.functional.pad(r, (width - len(r), 0)) for r in rows])
    mask = torch.stack([torch.nn.functional.pad(torch.ones_like(r), (width - len(r), 0)) for r in rows])
    hook = make_steering_hook_hf(3 * vector(), token=token)
    _, together = greedy(model, ids, 4, hook, use_cache=True, mask=mask)
    for i, row in enumerate(rows):
        _, alone = greedy(model, row[None], 4, hook, use_cache=True)
        torch.testing.assert_close(together[:, i], alone[:, 0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("token", [None, slice(-2, None), 8], ids=str)
def test_generate_with_a_cache_equals_generate_without(name, token):
    model = build(name)
    out = []
    for use_cache in (True, False):
        with hf_hooks_contextmanager(model, [(LAYER, make_steering_hook_hf(3 * vector(), token=token))]):
            out.append(
                model.generate(
                    IDS,
                    attention_mask=torch.ones_like(IDS),
                    max_new_tokens=6,
                    min_new_tokens=6,
                    do_sample=False,
                    use_cache=use_cache,
                )
            )
    assert torch.equal(*out)


def test_one_context_serves_several_prompts():
    """Negative positions count from the prompt at hand, also for the second prompt in one context."""
    model = build("llama")
    hook = make_steering_hook_hf(vector(), token=-1)
    seen = []
    with hf_hooks_contextmanager(model, [(LAYER, hook), (LAYER, make_activs_hook_hf(seen))]):
        logits(model, IDS)
        logits(model, IDS[:, :3] + 1)
    change = seen[1] - residual(model, ids=IDS[:, :3] + 1)
    assert change.abs().sum(-1)[0].nonzero().flatten().tolist() == [2]


def test_a_negative_position_after_the_prompt_was_cached_is_an_error():
    model = build("llama")
    cache = returned_caches(model(input_ids=IDS, use_cache=True))
    with (
        pytest.raises(ValidationError, match="already in the cache"),
        hf_hooks_contextmanager(model, [(LAYER, make_steering_hook_hf(vector(), token=-1))]),
    ):
        logits(model, IDS[:, :1], **cache)


def test_other_arguments_of_the_layer_are_kept():
    model = build("llama")
    seen = []
    handle = model.model.layers[LAYER].register_forward_pre_hook(
        lambda m, a, k: seen.append((len(a), {n: v for n, v in k.items() if n != "hidden_states"})),
        with_kwargs=True,
    )
    logits(model)
    handle.remove()
    with hf_hooks_contextmanager(model, [(LAYER, make_steering_hook_hf(vector()))]):
        handle = model.model.layers[LAYER].register_forward_pre_hook(
            lambda m, a, k: seen.append((len(a), {n: v for n, v in k.items() if n != "hidden_states"})),
            with_kwargs=True,
        )
        logits(model)
        handle.remove()
    assert seen[0][0] == seen[1][0] and seen[0][1].keys() == seen[1][1].keys()
    assert seen[1][1]["position_embeddings"] is not None


def test_hooks_are_removed_on_exit_on_error_and_when_registering_fails():
    model = build("llama")
    before = n_hooks(model)
    with (
        pytest.raises(RuntimeError, match="mine"),
        hf_hooks_contextmanager(model, [(0, make_steering_hook_hf(1, token=1))]),
    ):
        assert n_hooks(model) > before
        raise RuntimeError("mine")
    assert n_hooks(model) == before
    good = make_steering_hook_hf(1, token=2)
    with (
        pytest.raises(ValidationError, match=r"Layer 99 does not exist"),
        hf_hooks_contextmanager(model, [(0, good), (99, good)]),
    ):
        pass
    assert n_hooks(model) == before


def test_negative_layers_count_from_the_end():
    model = build("llama")
    v = vector()
    assert torch.equal(steered_logits(model, v, layer=-1), steered_logits(model, v, layer=N_LAYERS - 1))


def test_a_users_own_pre_hook_of_either_form_is_accepted():
    model = build("llama")
    x = residual(model)
    two = residual(model, [(LAYER, lambda module, args: (args[0] + 1, *args[1:]))])
    three = residual(model, [(LAYER, lambda module, args, kwargs: ((args[0] + 1, *args[1:]), kwargs))])
    torch.testing.assert_close(two, x + 1)
    torch.testing.assert_close(three, x + 1)


def test_unsupported_architecture_names_what_was_looked_for_and_the_override():
    odd = FAMILIES["llama"]()
    odd.model.my_blocks = odd.model.layers
    del odd.model.layers
    odd.config.num_hidden_layers = 7
    with (
        pytest.raises(
            ValidationError, match=r"model\.layers, .*layers='transformer\.my_blocks'.*model\.my_blocks \(4\)"
        ),
        hf_hooks_contextmanager(odd, []),
    ):
        pass
    with hf_hooks_contextmanager(odd, [(1, make_steering_hook_hf(1))], layers="model.my_blocks"):
        assert odd.model.my_blocks[1]._forward_pre_hooks


@given(seed=st.integers(0, 1000), scale=st.floats(1e-3, 1e3))
@settings(max_examples=20, deadline=None)
def test_make_abl_mat_removes_the_component_and_ignores_the_length(seed, scale):
    v, x = vector(seed).double() * scale, vector(seed + 1).double()
    ablated = x + make_abl_mat(v) @ x
    assert abs(float(ablated @ v)) < 1e-9 * float(v.norm() * x.norm())
    torch.testing.assert_close(ablated + (x @ v) / (v @ v) * v, x)


def test_make_abl_mat_is_differentiable_through_the_norm():
    v = vector().double()[:5].clone().requires_grad_()
    assert torch.autograd.gradcheck(make_abl_mat, (v,))


@pytest.mark.parametrize("bad", [torch.zeros(4), torch.full((4,), float("nan")), torch.ones(2, 2)])
def test_make_abl_mat_of_no_direction_is_a_value_error(bad):
    with pytest.raises(ValueError):
        make_abl_mat(bad)


def test_wrong_width_and_wrong_token_are_errors():
    model = build("llama")
    with pytest.raises(ValidationError, match=r"\[7\], but the residual stream is 48 wide"):
        steered_logits(model, torch.ones(7))
    with pytest.raises(ValidationError, match="int, a slice or None"):
        make_steering_hook_hf(1, token="last")
    with pytest.raises(ValidationError, match="step of 1 or more"):
        steered_logits(model, vector(), token=slice(None, None, -1))


def test_the_tflens_hook_is_the_same_function_of_x():
    v, m, x = vector(), torch.randn(D_MODEL, D_MODEL), torch.randn(2, 5, D_MODEL)
    hf = make_steering_hook_hf(v, m)(None, (x,))[0]
    torch.testing.assert_close(make_steering_hook_tflens(v, m)(x, hook=None), hf)
    partly = make_steering_hook_tflens(v, m, token=slice(1, -1))(x, hook=None)
    assert torch.equal(partly[:, [0, 4]], x[:, [0, 4]])
    torch.testing.assert_close(partly[:, 1:4], hf[:, 1:4])


def test_the_tflens_hook_with_token_refuses_a_single_token_without_context():
    with pytest.raises(ValidationError, match="positions"):
        make_steering_hook_tflens(vector(), token=0)(torch.randn(1, 1, D_MODEL), hook=None)


@pytest.mark.parametrize("name", SLIDING)
def test_positions_hold_when_a_sliding_cache_has_dropped_tokens(name):
    model = sliding_family(name, 4)
    out = []
    for use_cache in (True, False):
        with hf_hooks_contextmanager(
            model, [(LAYER, make_steering_hook_hf(3 * vector(), token=slice(8, 11)))]
        ):
            out.append(
                model.generate(
                    IDS,
                    attention_mask=torch.ones_like(IDS),
                    max_new_tokens=7,
                    min_new_tokens=7,
                    do_sample=False,
                    use_cache=use_cache,
                )
            )
    assert torch.equal(*out)


@pytest.mark.parametrize("matrix", [None, 0.5])
@pytest.mark.parametrize("grad", [False, True])
def test_compiling_a_steered_layer_breaks_no_graph(matrix, grad):
    layer = torch.nn.Linear(8, 8)
    layer.register_forward_pre_hook(make_steering_hook_hf(torch.arange(8.0), matrix), with_kwargs=True)
    x = torch.randn(1, 3, 8, requires_grad=grad)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))


def test_hooks_may_come_from_an_iterator():
    model = build("llama")
    hooks = [make_steering_hook_hf(vector()), make_steering_hook_hf(vector(1), token=slice(1, None))]
    expected = residual(model, list(zip((0, 1), hooks, strict=True)))
    seen = []
    with hf_hooks_contextmanager(model, zip((0, 1, LAYER), [*hooks, make_activs_hook_hf(seen)], strict=True)):
        logits(model)
    assert torch.equal(seen[0], expected)


def test_a_default_argument_of_a_users_hook_is_left_alone():
    model = build("llama")
    hooks = [(LAYER, lambda module, args, v=v: (args[0] + v, *args[1:])) for v in (1.0, 2.0)]
    torch.testing.assert_close(residual(model, hooks), residual(model) + 3)


def test_make_abl_mat_of_a_long_half_precision_vector():
    v = (100 * torch.randn(512, generator=torch.Generator().manual_seed(0))).half()
    torch.testing.assert_close(make_abl_mat(v), make_abl_mat(v.float()).half())


@pytest.mark.parametrize("bad", [float("nan"), torch.tensor([1.0, torch.inf]), "x", torch.ones(24, 2)])
def test_a_vector_that_is_none_is_an_error(bad):
    with pytest.raises(ValidationError):
        steered_logits(build("llama"), bad)


class Named(nn.Module):
    """A model whose layers are given everything by names of its own."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(8, 8)

        def forward(self, *, mask: Tensor, stream: Tensor) -> Tensor:
            return stream + self.up(stream).cumsum(1) * mask[..., None]

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=20, hidden_size=8, num_hidden_layers=2)
        self.embed, self.lm_head = nn.Embedding(20, 8), nn.Linear(8, 20)
        self.layers = nn.ModuleList(self.Block() for _ in range(2))

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(mask=torch.ones_like(input_ids), stream=hidden)
        return hidden


def test_the_stream_is_found_among_arguments_of_any_name():
    torch.manual_seed(0)
    model, ids, vector, seen = Named(), torch.arange(6)[None], torch.ones(8), []
    with torch.no_grad():
        plain = model(ids)
        with SteeringPlan([Intervention(0, Edit.add(vector), tokens=slice(2, None))]).apply(model):
            planned = model(ids)
        hooks = [(0, make_steering_hook_hf(vector, token=slice(2, None))), (0, make_activs_hook_hf(seen))]
        with hf_hooks_contextmanager(model, hooks):
            torch.testing.assert_close(model(ids), planned)
        moved = model.embed(ids) + vector * (torch.arange(6) >= 2)[:, None]
        torch.testing.assert_close(seen[0], moved)
        torch.testing.assert_close(planned[:, :2], plain[:, :2])
        assert not torch.allclose(planned[:, 2:], plain[:, 2:])
