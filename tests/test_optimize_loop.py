"""``optimize_vector``: step by step as the definition, its stopping rules, its options, and what it leaves behind."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from families import D_MODEL, FAMILIES, build, n_hooks, tiny_tokenizer
from naive_optimization import Naive

from mechanex.engine.models import adapter_for
from mechanex.utils.steering_opt import TrainingDatapoint, optimize_vector

TOKENIZER = tiny_tokenizer()
DATA = [
    TrainingDatapoint("The morning was", dst_completions=[" calm.", " cold"], src_completions=[" dark"]),
    TrainingDatapoint("She said that the bread", src_completions=[" was warm"], is_negative=True),
    TrainingDatapoint("A woman at the river", dst_completions=[" sings"], token=slice(-2, None)),
]
N_COMPLETIONS = 5


def optimize(model=None, data=DATA, layer=2, **options):
    model = build("llama") if model is None else model
    return optimize_vector(model, data, layer, tokenizer=TOKENIZER, **({"seed": 0} | options))


def start_of(seed: int = 0, norm: float = 1.0) -> torch.Tensor:
    return optimize(max_iters=0, seed=seed, starting_norm=norm)[0]


def naive(model=None, data=DATA, layers=(2,), **options) -> Naive:
    model = build("llama") if model is None else model
    return Naive(model, TOKENIZER, adapter_for(model).layers, data, layers, **options)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "mamba"])
def test_every_step_is_the_definitions(name):
    model, lr = build(name), 0.05
    start = optimize(model, max_iters=0)[0]
    vectors, losses, _ = naive(model).optimize(start, 4, lr)
    vector, info = optimize(model, max_iters=4, lr=lr, return_loss_history=True, return_vec_history=True)
    assert info["iters"] == 4 and len(info["vec_history"]) == len(info["loss_history"]) == 4
    for ours, truth in zip(info["vec_history"], vectors, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-4)
    assert torch.equal(vector, info["vec_history"][-1])
    assert [info["starting_loss"], *info["loss_history"]] == pytest.approx(losses, rel=1e-4)
    assert info["loss"] == info["loss_history"][-1] and info["norm"] == pytest.approx(float(vector.norm()))


@pytest.mark.parametrize(
    ("options", "defined"),
    [
        ({"vector_clamp": 1.5}, {"clamp": 1.5}),
        ({"do_one_minus": False, "coldness": 1.2}, {"do_one_minus": False, "coldness": 1.2}),
        ({"normalize_token_length": True, "eps": 0.01}, {"normalize": True, "eps": 0.01}),
        ({"normalize_completion_length": True}, {"normalize": True}),
        ({"only_hook_prompt": True}, {"only_hook_prompt": True}),
    ],
    ids=["clamp", "plain suppression", "normalized", "alias", "prompt only"],
)
def test_options_of_the_loss_and_the_edit_are_the_definitions(options, defined):
    start = start_of(norm=2.0)
    vectors, losses, _ = naive(**defined).optimize(start, 3, 0.05)
    vector, info = optimize(starting_vec=start, max_iters=3, lr=0.05, target_loss_target_iters=9, **options)
    torch.testing.assert_close(vector, vectors[-1], rtol=1e-4, atol=1e-4)
    assert info["loss"] == pytest.approx(losses[-1], rel=1e-4)


def test_several_layers_and_max_norm():
    start = start_of()
    vectors, _, _ = naive(layers=(1, 3)).optimize(start, 4, 0.1, max_norm=1.2)
    vector, info = optimize(layer=[-1, 1], starting_vec=start, max_iters=4, lr=0.1, max_norm=1.2)
    torch.testing.assert_close(vector, vectors[-1], rtol=1e-4, atol=1e-4)
    assert info["norm"] <= 1.2 + 1e-6


def test_affine_steering_optimizes_both_factors_and_bounds_their_rows():
    vector, matrix, info = optimize(max_iters=0, affine_rank=2)
    factors = (info["matrix_left"], info["matrix_right"])
    assert all(torch.allclose(f.norm(dim=1), torch.ones(2)) for f in factors)
    vectors, losses, truth = naive().optimize(vector, 4, 0.4, factors=factors)
    vector, matrix, info = optimize(max_iters=4, lr=0.4, affine_rank=2)
    torch.testing.assert_close(vector, vectors[-1], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(matrix, truth, rtol=1e-3, atol=1e-3)
    assert matrix.shape == (D_MODEL, D_MODEL) and info["loss"] == pytest.approx(losses[-1], rel=1e-3)
    assert max(float(f.norm(dim=1).max()) for f in (info["matrix_left"], info["matrix_right"])) <= 2 + 1e-5
    _, _, bounded = optimize(max_iters=4, lr=0.4, affine_rank=2, max_affine_norm=1.1)
    assert float(bounded["matrix_left"].norm(dim=1).max()) <= 1.1 + 1e-5


def test_satisfice_steers_each_loss_to_its_target():
    data = [
        TrainingDatapoint(
            "The morning was", dst_completions=[" calm."], dst_completions_target_losses=[18.0]
        ),
        TrainingDatapoint("A woman", dst_completions=[" sings"]),
    ]
    start = start_of()

    def objective(losses):
        return (losses[0] - 18.0) ** 2 + (losses[1] - 16.0) ** 2

    vectors, _, _ = naive(data=data).optimize(start, 3, 0.05, objective=objective)
    vector, _ = optimize(
        data=data, starting_vec=start, max_iters=3, lr=0.05, satisfice=True, target_loss=16.0
    )
    torch.testing.assert_close(vector, vectors[-1], rtol=1e-4, atol=1e-4)
    _, info = optimize(
        data=data, max_iters=300, lr=0.05, satisfice=True, target_loss=16.0, do_target_loss_sum=False, eps=0
    )
    assert info["loss"][0] == [[], [pytest.approx(18.0, abs=0.2)]]
    assert info["loss"][1] == [[], [pytest.approx(16.0, abs=0.2)]]


# Stopping


def history(**options):
    return optimize(max_iters=40, lr=0.05, return_loss_history=True, **options)[1]


def test_the_sum_of_the_losses_is_compared_with_the_target():
    losses = history()["loss_history"]
    target = losses[14] + 1e-6
    first = next(k for k, loss in enumerate(losses, 1) if loss <= target)
    info = history(target_loss=target)
    assert (info["iters"], info["stopped"]) == (first, "target_loss") and info["loss"] <= target
    assert history(target_loss=target, target_loss_target_iters=3)["iters"] == first + 2
    assert history(target_loss=-1e9)["stopped"] == "max_iters"


def test_a_target_met_at_the_start_takes_no_step():
    vector, info = optimize(target_loss=1e9)
    assert info["iters"] == 0 and info["stopped"] == "target_loss" and torch.equal(vector, start_of())


def test_without_the_sum_every_completion_has_to_meet_the_target():
    info = history(do_target_loss_sum=False)
    assert [len(side) for pair in info["loss"] for side in pair] == [1, 2, 1, 0, 0, 1]
    worst = [max(loss for pair in step for side in pair for loss in side) for step in info["loss_history"]]
    target = worst[20] + 1e-6
    first = next(k for k, loss in enumerate(worst, 1) if loss <= target)
    stopped = history(do_target_loss_sum=False, target_loss=target)
    assert (stopped["iters"], stopped["stopped"]) == (first, "target_loss")


def test_target_losses_of_datapoints_suffice_and_go_before_the_common_one():
    losses = [step[0][1][0] for step in history(do_target_loss_sum=False)["loss_history"]]
    own = [
        TrainingDatapoint(
            DATA[0].prompt, [" dark"], [" calm.", " cold"], None, [losses[9] + 1e-6, 1e9], DATA[0].token
        ),
        *DATA[1:],
    ]
    first = next(k for k, loss in enumerate(losses, 1) if loss <= losses[9] + 1e-6)
    # Others that are far from the common target keep it going, also where the sum is what is compared.
    steps = history(do_target_loss_sum=False)["loss_history"]
    worst = [max(loss for pair in step for side in pair for loss in side) for step in steps]
    later = next(k for k, loss in enumerate(worst, 1) if loss <= worst[29] + 1e-6)
    assert later > first
    assert history(data=own, do_target_loss_sum=False, target_loss=worst[29] + 1e-6)["iters"] == later
    summed = history(data=own, target_loss=worst[29] + 1e-6)
    assert (summed["iters"], summed["stopped"]) == (later, "target_loss")
    assert history(data=own, do_target_loss_sum=False, target_loss=1e9)["iters"] == first
    assert history(data=own, do_target_loss_sum=False, target_loss=-1e9)["iters"] == 40


def test_a_loss_that_stands_still_ends_it():
    info = optimize(lr=1e-9, eps=1e-3)[1]
    assert (info["iters"], info["stopped"]) == (1, "converged")
    assert optimize(lr=1e-9, eps=1e-3, target_loss_target_iters=4)[1]["iters"] == 4


def test_without_any_end_ten_thousand_steps_are_the_most(monkeypatch, caplog):
    from mechanex.engine.optimize import settings

    monkeypatch.setattr(settings, "LIMIT", 6)
    info = optimize(lr=0.05)[1]
    assert (info["iters"], info["stopped"]) == (6, "limit") and "pass max_iters" in caplog.text


def test_max_iters_is_exact_and_zero_evaluates_the_start():
    vector, info = optimize(max_iters=0)
    assert info["iters"] == 0 and info["loss"] == info["starting_loss"] and math.isfinite(info["loss"])
    assert float(vector.norm()) == pytest.approx(1.0)


# Options that are ours


def test_the_seed_decides_the_start_and_is_recorded():
    assert torch.equal(start_of(3), start_of(3)) and not torch.equal(start_of(3), start_of(4))
    torch.manual_seed(5)
    first = optimize_vector(build("llama"), DATA, 2, max_iters=0, tokenizer=TOKENIZER)
    torch.manual_seed(5)
    again = optimize_vector(build("llama"), DATA, 2, max_iters=0, tokenizer=TOKENIZER)
    assert torch.equal(first[0], again[0]) and torch.equal(start_of(first[1]["seed"]), first[0])
    generator = torch.Generator().manual_seed(9)
    drawn = [optimize(seed=None, generator=generator, max_iters=0)[1]["seed"] for _ in range(2)]
    assert len(set(drawn)) == 2
    assert drawn[0] == optimize(seed=None, generator=torch.Generator().manual_seed(9), max_iters=0)[1]["seed"]


def test_a_callback_sees_every_vector_and_may_stop():
    seen = []

    def callback(step, loss, vector):
        seen.append((step, loss, vector))
        return step == 3

    vector, info = optimize(max_iters=10, callback=callback)
    assert [step for step, _, _ in seen] == [0, 1, 2, 3]
    assert (info["stopped"], info["iters"], info["loss"]) == ("callback", 3, seen[-1][1])
    assert torch.equal(seen[-1][2], vector) and not torch.equal(seen[0][2], vector)


def test_learning_rate_schedules_and_clipping():
    def lengths(**options):
        vectors = [
            start_of(),
            *optimize(max_iters=8, lr=0.1, eps=0, return_vec_history=True, **options)[1]["vec_history"],
        ]
        return [float((b - a).norm()) for a, b in itertools.pairwise(vectors)]

    plain, linear, cosine = lengths(), lengths(lr_schedule="linear"), lengths(lr_schedule="cosine")
    assert linear[0] == cosine[0] == plain[0]
    assert linear[-1] < 0.3 * plain[-1] and cosine[-1] < 0.1 * plain[-1]
    assert lengths(lr_schedule=lambda step: 0.0 if step else 1.0)[1:] == [0.0] * 7
    assert lengths(grad_clip=1e9) == plain
    # Adam's step hardly depends on the gradient's size, but does on it beside its epsilon.
    assert lengths(grad_clip=1e-9)[0] < 0.5 * plain[0]


def test_the_evaluation_set_is_watched_and_patience_returns_its_best():
    held_out = [TrainingDatapoint("The old man", dst_completions=[" sold apples"])]
    options = {"lr": 0.3, "max_iters": 60, "eval_datapoints": held_out, "return_vec_history": True}
    _, info = optimize(data=DATA[:1], **options)
    assert len(info["eval_loss_history"]) == 61
    vector, tired = optimize(data=DATA[:1], patience=4, **options)
    evals = tired["eval_loss_history"]
    best = evals.index(min(evals))
    assert tired["stopped"] == "patience" and len(evals) == best + 5 == tired["iters"] + 1
    chosen = start_of() if best == 0 else tired["vec_history"][best - 1]
    assert torch.equal(vector, chosen)
    truth = naive(data=held_out).losses(vector)
    assert min(evals) == pytest.approx(float(truth[0].detach()), rel=1e-4)


def test_a_plateau_ends_it_once_most_of_the_fall_is_behind():
    options = {"lr": 0.5, "max_iters": 120, "max_norm": 3.0, "eps": 0.0, "return_loss_history": True}
    _, whole = optimize(data=DATA[:1], **options)
    _, ended = optimize(data=DATA[:1], plateau=0.02, **options)
    steps = ended["iters"]
    assert ended["stopped"] == "plateau" and 3 < steps < 60
    assert ended["loss_history"] == whole["loss_history"][:steps]
    start = ended["starting_loss"]
    assert start - ended["loss"] >= 0.85 * (start - min(whole["loss_history"]))
    # The fall of the last three evaluations is less than that share of all.
    losses = [start, *ended["loss_history"]]
    assert losses[-4] - losses[-1] <= 0.02 * (start - losses[-1])


def test_debug_prints_each_step_and_progress_shows_a_bar(capsys):
    optimize(max_iters=2, debug=True, progress=True)
    out = capsys.readouterr()
    assert (
        "step 0: loss" in out.out
        and "step 2: loss" in out.out
        and "Optimizing by gradient descent" in out.err
    )


def test_results_come_as_documented():
    assert len(optimize(max_iters=1, return_info=False)) == 1
    assert len(optimize(max_iters=1, affine_rank=1)) == 3
    vector, info = optimize(max_iters=1)
    assert not vector.requires_grad and vector.dtype == torch.float32 and vector.shape == (D_MODEL,)
    assert "loss_history" not in info and "vec_history" not in info and "output_constr_iters" not in info


# What it leaves behind


def snapshot(model):
    return (
        [p.requires_grad for p in model.parameters()],
        [m.training for m in model.modules()],
        n_hooks(model),
        [p.grad is None for p in model.parameters()],
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
    )


def unchanged(model, before) -> bool:
    *flags, weights = snapshot(model)
    return flags == list(before[:4]) and all(torch.equal(weights[n], t) for n, t in before[4].items())


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_the_model_comes_back_as_it_was(error):
    model = FAMILIES["gpt2"]().train()
    model.lm_head.weight.requires_grad_(False)
    model.transformer.h[1].eval()
    before = snapshot(model)

    def callback(step, loss, vector):
        if error is not None and step == 1:
            raise error("in the middle")

    if error is None:
        optimize(model, max_iters=2)
    else:
        with pytest.raises(error, match="in the middle"):
            optimize(model, max_iters=2, callback=callback)
    assert unchanged(model, before)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_model_comes_back_as_it_was_after_an_error_inside_of_it(error):
    model = FAMILIES["llama"]()
    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) == 60:
            raise error("inside")

    handle = model.model.layers[3].register_forward_pre_hook(fail)
    before = snapshot(model)
    with pytest.raises(error, match="inside"):
        optimize(model, max_iters=100)
    assert unchanged(model, before)
    handle.remove()
    assert torch.equal(optimize(model, max_iters=2)[0], optimize(max_iters=2)[0])


def test_ctrl_c_keeps_the_best_vector_where_that_is_asked_for():
    def callback(step, loss, vector):
        losses.append((loss, vector))
        if step == 5:
            raise KeyboardInterrupt

    losses = []
    vector, info = optimize(max_iters=50, lr=0.05, callback=callback, keep_on_interrupt=True)
    best = min(losses[:5], key=lambda pair: pair[0])
    assert info["stopped"] == "interrupted" and info["loss"] == best[0] and torch.equal(vector, best[1])


def test_it_works_under_no_grad_and_inference_mode():
    truth = optimize(max_iters=3)[0]
    with torch.no_grad():
        assert torch.equal(optimize(max_iters=3)[0], truth)
    with torch.inference_mode():
        assert torch.equal(optimize(max_iters=3)[0], truth)


def test_steering_that_is_applied_already_counts():
    from mechanex.engine.hooks import Intervention, SteeringPlan
    from mechanex.engine.intervention import Edit

    ones, options = torch.ones(D_MODEL), {"data": DATA[:1], "max_iters": 0}
    with SteeringPlan([Intervention(2, Edit.add(ones))]).apply(build("llama")):
        applied = optimize(starting_vec=0 * ones, **options)[1]["loss"]
    assert applied == pytest.approx(optimize(starting_vec=ones, **options)[1]["loss"], rel=1e-5)
    assert applied != pytest.approx(optimize(starting_vec=0 * ones, **options)[1]["loss"], rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_are_optimized_in_float32(dtype):
    model = FAMILIES["llama"]().to(dtype)
    truth, info = optimize(max_iters=12, lr=0.05)
    vector, half = optimize(model, max_iters=12, lr=0.05)
    assert vector.dtype == torch.float32 and half["loss"] < half["starting_loss"]
    assert half["loss"] == pytest.approx(info["loss"], rel=0.05)
    assert torch.cosine_similarity(vector, truth, dim=0) > 0.95
