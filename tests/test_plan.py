"""Edits and plans: many vectors, layers, masks and rows at once give what each would give alone, in order."""

from __future__ import annotations

import copy
import io
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from families import D_MODEL, FAMILIES, build, n_hooks
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import StaticCache

from mechanex.engine.caches import returned_caches
from mechanex.engine.hooks import Intervention, SteeringPlan, positions
from mechanex.engine.intervention import Edit, EditTable
from mechanex.engine.models import adapter_for
from mechanex.errors import ValidationError
from mechanex.utils.steering_opt import make_steering_hook_tflens

IDS = torch.tensor([[1, 9, 30, 71, 12], [1, 44, 45, 46, 47], [1, 7, 7, 8, 200]])


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids).logits


EDITS = {
    "add": lambda s: Edit.add(draw(D_MODEL, seed=s)),
    "ablate": lambda s: Edit.ablate(draw(D_MODEL, seed=s)),
    "clamp": lambda s: Edit.clamp(draw(D_MODEL, seed=s), 3.0),
    "affine": lambda s: Edit.affine(
        draw(D_MODEL, seed=s), draw(3, D_MODEL, seed=s + 1), draw(3, D_MODEL, seed=s + 2)
    ),
    "dense": lambda s: Edit.dense(draw(D_MODEL, seed=s), draw(D_MODEL, D_MODEL, seed=s + 1)),
}
edits = st.builds(lambda kind, seed: EDITS[kind](seed), st.sampled_from(sorted(EDITS)), st.integers(0, 50))


@given(edits, edits, st.integers(0, 9))
@settings(deadline=None, max_examples=60)
def test_composing_equals_one_after_another(first, second, seed):
    x = draw(4, D_MODEL, seed=seed)
    torch.testing.assert_close(first.then(second).apply(x), second.apply(first.apply(x)))


@given(edits, st.floats(-3, 3), st.integers(0, 9))
@settings(deadline=None, max_examples=40)
def test_scaling_multiplies_the_whole_effect(edit, strength, seed):
    x = draw(4, D_MODEL, seed=seed)
    torch.testing.assert_close(edit.scaled(strength).apply(x) - x, strength * (edit.apply(x) - x))


def test_clamp_and_ablate_set_the_projection():
    v, x = draw(D_MODEL), draw(6, D_MODEL, seed=3)
    direction = v / v.norm()
    torch.testing.assert_close(Edit.clamp(v, 2.5).apply(x) @ direction, (2.5 * v.norm()).expand(6))
    assert (Edit.ablate(v).apply(x) @ direction).abs().max() < 1e-12


def test_a_table_of_mixed_ranks_edits_each_row_by_its_own():
    table = [EDITS[kind](i) for i, kind in enumerate(["add", "clamp", "affine"])]
    x = draw(5, D_MODEL, seed=9)
    rows = torch.tensor([2, -1, 0, 1, 2], dtype=torch.int32)
    out = EditTable(table).apply(x, rows)
    for i, k in enumerate(rows.tolist()):
        torch.testing.assert_close(out[i], x[i] if k < 0 else table[k].apply(x[i : i + 1])[0])


def test_each_row_of_a_batch_can_be_steered_its_own_way():
    model = build("llama")
    v, w = draw(D_MODEL, seed=1), draw(D_MODEL, seed=2)
    plan = SteeringPlan(
        [
            Intervention(1, Edit.add(v), rows=[0, 1]),
            Intervention(1, Edit.clamp(w, 2.0), rows=[1]),
            Intervention(3, Edit.add(w), rows=[2], tokens=slice(2, None)),
        ]
    )
    with plan.apply(model):
        together = logits(model)
    alone = [
        [Intervention(1, Edit.add(v))],
        [Intervention(1, Edit.add(v)), Intervention(1, Edit.clamp(w, 2.0))],
        [Intervention(3, Edit.add(w), tokens=slice(2, None))],
    ]
    for i, interventions in enumerate(alone):
        with SteeringPlan(interventions).apply(model):
            torch.testing.assert_close(
                together[i : i + 1], logits(model, IDS[i : i + 1]), rtol=1e-4, atol=1e-4
            )


def test_an_overlap_runs_in_the_order_given():
    model = build("llama")
    v = draw(D_MODEL)
    after = [Intervention(2, Edit.clamp(v, 5.0)), Intervention(2, Edit.add(v), tokens=1)]
    before = after[::-1]
    out = []
    for interventions in (after, before):
        with SteeringPlan(interventions).apply(model):
            out.append(logits(model))
    torch.testing.assert_close(out[0][:, 0], out[1][:, 0])
    assert not torch.allclose(out[0][:, 1], out[1][:, 1], atol=1e-2)


def test_a_mask_picks_single_tokens():
    model = build("gpt2")
    mask = torch.zeros(IDS.shape, dtype=torch.bool)
    mask[0, 3] = mask[2, 4] = True
    with SteeringPlan([Intervention(2, Edit.add(draw(D_MODEL)), mask=mask)]).apply(model):
        steered = logits(model)
    changed = (steered - logits(model)).abs().amax(-1) > 1e-4
    assert changed.nonzero().tolist() == [[0, 3], [0, 4], [2, 4]]


def test_sixty_four_rows_with_sixteen_edits():
    model = build("llama")
    ids = IDS[:1].repeat(64, 1)
    vectors = [draw(D_MODEL, seed=s) for s in range(16)]
    plan = [Intervention(1, Edit.add(v), rows=range(k, 64, 16)) for k, v in enumerate(vectors)]
    with SteeringPlan(plan).apply(model):
        out = logits(model, ids)
    for k in (0, 5, 15):
        with SteeringPlan([Intervention(1, Edit.add(vectors[k]))]).apply(model):
            torch.testing.assert_close(out[k + 16 : k + 17], logits(model, IDS[:1]), rtol=1e-4, atol=1e-4)


def test_tokens_of_a_plan_hold_under_generate_with_a_cache():
    model = build("llama")
    out = []
    for use_cache in (True, False):
        plan = [
            Intervention(1, Edit.add(4 * draw(D_MODEL)), tokens=slice(-1, None), rows=[0]),
            Intervention(1, Edit.add(4 * draw(D_MODEL, seed=5)), tokens=slice(None, -1)),
        ]
        with SteeringPlan(plan).apply(model):
            mask = torch.ones_like(IDS)
            out.append(
                model.generate(
                    IDS, attention_mask=mask, max_new_tokens=5, do_sample=False, use_cache=use_cache
                )
            )
    assert torch.equal(*out)


def test_gradients_reach_every_parameter_of_every_edit():
    model = FAMILIES["gpt2"]().double()
    v, left, right = (
        t.requires_grad_() for t in (draw(D_MODEL), draw(2, D_MODEL, seed=1), draw(2, D_MODEL, seed=2))
    )

    def loss(v, left, right):
        plan = [
            Intervention(1, Edit.affine(v, left, right), rows=[0, 2]),
            Intervention(3, Edit.clamp(v, 2.0), tokens=1),
        ]
        with SteeringPlan(plan).apply(model):
            return model(input_ids=IDS).logits[:, -1].logsumexp(-1).sum()

    assert torch.autograd.gradcheck(loss, (v, left, right), eps=1e-5, rtol=1e-4, fast_mode=True)


def test_the_handle_is_removable_twice_and_a_context_manager():
    model = build("llama")
    plain, before = logits(model), n_hooks(model)
    handle = SteeringPlan([Intervention(0, Edit.add(torch.ones(D_MODEL)))]).apply(model)
    assert not torch.equal(logits(model), plain)
    handle.remove()
    handle.remove()
    assert torch.equal(logits(model), plain)
    with (
        pytest.raises(KeyError),
        SteeringPlan([Intervention(0, Edit.add(torch.ones(D_MODEL)), tokens=0)]).apply(model),
    ):
        raise KeyError
    assert n_hooks(model) == before


def test_an_empty_plan_changes_nothing():
    model = build("llama")
    with SteeringPlan([]).apply(model):
        assert torch.equal(logits(model), logits(model))


@pytest.mark.parametrize(
    ("interventions", "message"),
    [
        (lambda: [Intervention(9, Edit.add(torch.ones(D_MODEL)))], "Layer 9 does not exist: .* has 4 layers"),
        (lambda: [Intervention(True, Edit.add(torch.ones(D_MODEL)))], "A layer is an int"),
        (
            lambda: [Intervention(0, Edit.add(torch.ones(7)))],
            "7 wide, but the residual stream of .* is 48 wide",
        ),
        (lambda: [Intervention(0, Edit.add(torch.ones(D_MODEL)), rows=[-1])], "batch indices of 0 or more"),
        (lambda: [Intervention(0, Edit.ablate(torch.zeros(D_MODEL)))], "norm is 0"),
        (lambda: [Intervention(0, Edit.clamp(torch.full((D_MODEL,), torch.nan), 1))], "norm is nan"),
        (
            lambda: [Intervention(0, Edit.affine(torch.ones(D_MODEL), torch.ones(2, 3), torch.ones(2, 3)))],
            "rank, 48",
        ),
        (lambda: [Intervention(0, Edit(torch.ones(2, D_MODEL)))], "one vector"),
    ],
)
def test_wrong_plans_are_refused_and_leave_nothing(interventions, message):
    model = build("llama")
    before = n_hooks(model)
    with pytest.raises(ValidationError, match=message):
        SteeringPlan([Intervention(0, Edit.add(torch.ones(D_MODEL))), *interventions()]).apply(model)
    assert n_hooks(model) == before


def test_rows_and_masks_that_the_call_does_not_have_are_errors():
    model = build("llama")
    edit = Edit.add(torch.ones(D_MODEL))
    with (
        pytest.raises(ValidationError, match=r"Row 3 .* 3 rows"),
        SteeringPlan([Intervention(0, edit, rows=[3])]).apply(model),
    ):
        logits(model)
    wrong = SteeringPlan([Intervention(0, edit, mask=torch.ones(2, 2, dtype=torch.bool))])
    with pytest.raises(ValidationError, match=r"\[2, 2\], but the call is \[3, 5\]"), wrong.apply(model):
        logits(model)


def test_a_mask_is_taken_as_a_tensor_an_array_or_a_list():
    model, mask = build("llama"), torch.rand(IDS.shape, generator=torch.Generator().manual_seed(3)) < 0.5
    found = []
    for given_mask in (mask, mask.numpy(), mask.tolist()):
        plan = SteeringPlan([Intervention(2, Edit.add(draw(D_MODEL)), mask=given_mask)])
        with plan.apply(model):
            found.append(logits(model))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    for wrong in (mask.long(), mask[0], mask.int().numpy(), [[1, 0]], [[True], [True, False]], "yes"):
        with pytest.raises(ValidationError, match=r"A mask is \[batch, tokens\] of bool"):
            Intervention(2, Edit.add(draw(D_MODEL)), mask=wrong)


def test_the_positions_context_serves_hooks_attached_by_other_means():
    model = build("llama")
    hook = make_steering_hook_tflens(draw(D_MODEL), token=6)
    block = model.model.layers[2]
    seen = []

    def pre_hook(module, args):
        seen.append(bool((hook(args[0], hook=None) != args[0]).any()))

    handle = block.register_forward_pre_hook(pre_hook)
    with positions(model):
        model.generate(
            IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=4, min_new_tokens=4, do_sample=False
        )
    handle.remove()
    assert seen == [False, False, True, False]


@pytest.mark.ci
def test_a_model_that_was_compiled_before_is_steered():
    model = FAMILIES["llama"]()
    compiled = torch.compile(model, backend="eager")
    plain = logits(compiled)
    with SteeringPlan([Intervention(1, Edit.add(draw(D_MODEL)))]).apply(compiled):
        steered = logits(compiled)
        torch.testing.assert_close(steered, logits(model))
    assert not torch.allclose(steered, plain, atol=1e-2)
    torch.testing.assert_close(logits(compiled), plain)


def generate(model, ids, **options):
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=4,
        min_new_tokens=4,
        do_sample=False,
        **options,
    )


def test_a_second_turn_in_one_context_has_its_own_prompt_end():
    model = build("llama")
    plan = SteeringPlan([Intervention(1, Edit.add(4 * draw(D_MODEL)), tokens=slice(-1, None))])
    with plan.apply(model):
        first = generate(model, IDS[:1])
        second_prompt = torch.cat([first, IDS[1:2]], 1)
        together = generate(model, second_prompt)
    with plan.apply(model):
        assert torch.equal(generate(model, second_prompt), together)


def test_contexts_that_overlap_share_what_they_saw():
    model = build("llama")
    late = SteeringPlan([Intervention(2, Edit.add(draw(D_MODEL)), tokens=slice(-1, None))])
    with SteeringPlan([Intervention(1, Edit.add(draw(D_MODEL)), tokens=0)]).apply(model), torch.no_grad():
        out = model(input_ids=IDS, use_cache=True)
        unsteered = model(input_ids=IDS[:, :1], **copy.deepcopy(returned_caches(out))).logits
        with late.apply(model):
            steered = model(input_ids=IDS[:, :1], **returned_caches(out)).logits
    assert not torch.allclose(steered, unsteered, atol=1e-3)


def test_threads_do_not_mix_their_prompts_up():
    model = build("llama")
    starts = [0, 1, 2, 3]
    with SteeringPlan([Intervention(1, Edit.add(4 * draw(D_MODEL)), tokens=-2)]).apply(model):
        alone = [logits(model, IDS[:, n:]) for n in starts]
        with ThreadPoolExecutor(4) as pool:
            for _ in range(10):
                for expected, found in zip(
                    alone, pool.map(lambda n: logits(model, IDS[:, n:]), starts), strict=True
                ):
                    torch.testing.assert_close(found, expected)


def test_a_mask_of_the_caches_full_length_is_read_up_to_the_call():
    model = build("llama")
    mask = torch.zeros(3, 32, dtype=torch.long)
    mask[:, :5] = 1
    plan = SteeringPlan([Intervention(1, Edit.add(draw(D_MODEL)), tokens=slice(1, 3))])
    with plan.apply(model), torch.no_grad():
        cache = StaticCache(config=model.config, max_cache_len=32)
        found = model(input_ids=IDS, attention_mask=mask, past_key_values=cache, use_cache=True).logits
        torch.testing.assert_close(found, logits(model), rtol=1e-4, atol=1e-4)


def test_learned_vectors_keep_their_gradients_and_their_latest_values():
    model = build("gpt2")
    p = draw(D_MODEL).float().requires_grad_()
    plan = [
        Intervention(1, Edit.add(p), rows=[0]),
        Intervention(1, Edit.ablate(draw(D_MODEL).float()), rows=[0, 1]),
    ]
    with SteeringPlan(plan).apply(model):
        before = logits(model)
        for _ in range(2):
            (gradient,) = torch.autograd.grad(model(input_ids=IDS).logits.sum(), p)
            assert gradient.abs().sum() > 0
        with torch.no_grad():
            p += 1
        assert not torch.allclose(logits(model)[0], before[0], atol=1e-3)


def test_replaced_layers_are_the_ones_that_are_steered():
    model = FAMILIES["llama"]()
    plan = SteeringPlan([Intervention(-1, Edit.add(draw(D_MODEL)))])
    plan.apply(model).remove()
    model.model.layers = model.model.layers[:2]
    plain = logits(model)
    with plan.apply(model):
        assert not torch.allclose(logits(model), plain, atol=1e-3)
    with pytest.raises(ValidationError, match="has 2 layers"):
        SteeringPlan([Intervention(3, Edit.add(draw(D_MODEL)))]).apply(model)


def test_a_steered_model_pickles_and_copies_without_the_library():
    model = FAMILIES["llama"]()
    adapter_for(model)
    file = io.BytesIO()
    torch.save(model, file)
    assert b"mechanex." not in file.getvalue()
    for other in (copy.deepcopy(model), copy.copy(model)):
        assert adapter_for(other).model is other


def test_naming_the_layers_keeps_the_tokenizer_of_a_model():
    model = FAMILIES["llama"]()
    adapter_for(model).tokenizer = "mine"
    assert adapter_for(model, layers="model.layers").tokenizer == "mine"


@pytest.mark.parametrize(
    "arguments",
    [
        {"mask": torch.ones(3, 5, dtype=torch.long)},
        {"tokens": True},
        {"tokens": "1"},
        {"tokens": slice(None, None, -1)},
        {"rows": "0"},
        {"rows": [True]},
        {"edit": Edit.add(torch.full((D_MODEL,), torch.nan))},
        {"edit": torch.ones(D_MODEL)},
        {"edit": None},
        {"varying": 3},
        {"condition": "met"},
    ],
    ids=str,
)
def test_an_intervention_says_at_once_what_is_wrong_with_it(arguments):
    with pytest.raises(ValidationError):
        Intervention(**({"layer": 0, "edit": Edit.add(torch.ones(D_MODEL))} | arguments))


def test_an_edit_has_one_gate():
    once = Edit.add(torch.ones(4)).gated("step", torch.ones(4), -1.0)
    with pytest.raises(ValidationError, match="has a gate already"):
        once.gated("norm")


def test_factors_and_matrices_may_be_lists_and_arrays():
    rows = torch.randn(3, 4)
    left, right, matrix = torch.randn(2, 4), torch.randn(2, 4), torch.randn(4, 4)
    bias = [0.5, 0.0, -1.0, 2.0]
    truth = Edit.affine(torch.tensor(bias), left, right)
    for as_given in (torch.Tensor.tolist, torch.Tensor.numpy):
        assert torch.equal(Edit.affine(bias, as_given(left), as_given(right)).apply(rows), truth.apply(rows))
        found = Edit.dense(bias, as_given(matrix)).apply(rows)
        assert torch.equal(found, Edit.dense(torch.tensor(bias), matrix).apply(rows))
    with pytest.raises(ValidationError, match="left"):
        Edit.affine(bias, "ab", right)


@pytest.mark.parametrize(
    "given",
    [None, 3, "plan", torch.ones(2), {3: torch.ones(D_MODEL)}, [torch.ones(D_MODEL)], [(3, 1.0)]],
    ids=str,
)
def test_a_plan_is_made_of_interventions_alone(given):
    with pytest.raises(ValidationError, match="made of interventions"):
        SteeringPlan(given)


def test_a_plan_may_be_one_intervention():
    one = Intervention(1, Edit.add(torch.ones(D_MODEL)))
    assert SteeringPlan(one).interventions == SteeringPlan(iter([one])).interventions == [one]
