"""Noise on the vector's effect, the output-constrained phase, custom losses and MELBO."""

from __future__ import annotations

import math

import pytest
import torch
from families import D_MODEL, FAMILIES, build, n_hooks
from test_optimize_loop import DATA, TOKENIZER, naive, optimize, start_of

from mechanex.engine.models import adapter_for
from mechanex.engine.optimize.objective import draw, tangent
from mechanex.engine.optimize.settings import OptimizeSettings
from mechanex.engine.text import encode_pair
from mechanex.errors import ValidationError
from mechanex.utils.steering_opt import (
    hf_hooks_contextmanager,
    make_melbo_loss_funcs,
    make_steering_hook_hf,
)

# Noise


def test_noise_is_gaussian_of_the_given_scale_and_depends_on_seed_and_step_alone():
    settings = OptimizeSettings(noise_scale=0.3, noise_iters=4)
    noise = draw(settings, 7, 5, 20, 500)
    assert noise.shape == (4, 20, 500)
    assert float(noise.std()) == pytest.approx(0.3, rel=0.02) and abs(float(noise.mean())) < 0.01
    assert torch.equal(noise, draw(settings, 7, 5, 20, 500))
    for other in (
        draw(settings, 8, 5, 20, 500),
        draw(settings, 7, 6, 20, 500),
        noise.roll(1, 0),
        noise.roll(1, 1),
    ):
        correlation = (noise * other).mean() / noise.square().mean()
        assert abs(float(correlation)) < 0.03


def test_anti_correlated_noise_is_the_difference_of_successive_draws():
    plain, anti = OptimizeSettings(noise_scale=1.0), OptimizeSettings(noise_scale=1.0, do_antipgd=True)
    draws = [draw(plain, 1, step, 3, 8) for step in range(4)]
    assert torch.equal(draw(anti, 1, 0, 3, 8), draws[0])
    for step in range(1, 4):
        assert torch.equal(draw(anti, 1, step, 3, 8), draws[step] - draws[step - 1])


def test_tangent_noise_leaves_the_gradients_direction_out():
    noise, gradient = torch.randn(2, 5, 16), torch.randn(5, 16)
    gradient[3] = 0
    free = tangent(noise, gradient)
    assert (free * gradient).sum(-1).abs().max() < 1e-4
    assert torch.equal(free[:, 3], noise[:, 3])
    unit = gradient / gradient.norm(dim=-1, keepdim=True).clamp_min(1e-9)
    truth = noise - (noise * unit).sum(-1, keepdim=True) * unit
    torch.testing.assert_close(free, truth, rtol=1e-4, atol=1e-5)
    upward = tangent(noise, gradient, only_descent=True)
    along = (noise * gradient).sum(-1)
    assert torch.equal(upward[along >= 0], noise[along >= 0])
    assert (upward * gradient).sum(-1).min() > -1e-4


@pytest.mark.parametrize(
    "options",
    [
        {"do_tangent_space_noise": False},
        {},
        {"do_noise_abl_relu": True, "noise_iters": 2},
        {"do_antipgd": True},
        {"vector_clamp": 1.3},
        {"vector_clamp": -0.7, "do_noise_abl_relu": True},
    ],
    ids=["plain", "tangent", "relu", "antipgd", "clamp", "clamp, relu"],
)
def test_noisy_steps_are_the_definitions(options):
    data, lr, seed = DATA[:1] + DATA[2:], 0.05, 2
    settings = OptimizeSettings(noise_scale=0.5, **options)
    truth = naive(data=data, clamp=settings.vector_clamp)
    v = start_of(seed).requires_grad_()
    adam = torch.optim.Adam([v], lr=lr)
    places = truth.completions()
    for step in range(3):
        gradients = []
        for noise in draw(settings, seed, step, len(places), D_MODEL):
            for i, place in enumerate(places):
                nothing = torch.zeros(D_MODEL, requires_grad=True)
                (slope,) = torch.autograd.grad(truth.loss(*place, v, None, nothing), nothing)
                own = tangent(noise[i], slope, only_descent=settings.do_noise_abl_relu)
                own = own if settings.do_tangent_space_noise else noise[i]
                gradients.append(torch.autograd.grad(truth.loss(*place, v, None, own), v)[0])
        v.grad = torch.stack(gradients).sum(0) / settings.noise_iters
        adam.step()
    vector, info = optimize(data=data, seed=seed, max_iters=3, lr=lr, noise_scale=0.5, **options)
    torch.testing.assert_close(vector, v.detach(), rtol=1e-3, atol=1e-3)
    clean = sum(float(loss.detach()) for loss in truth.losses(vector))
    assert info["loss"] == pytest.approx(clean, rel=1e-4)


def test_noise_of_scale_zero_is_none():
    assert torch.equal(optimize(max_iters=3, noise_scale=0.0)[0], optimize(max_iters=3)[0])


# The output-constrained phase


@pytest.mark.parametrize(
    "options",
    [{}, {"affine_rank": 1, "lr": 0.02}, {"vector_clamp": 1.0, "data": DATA[2:], "output_constr_lr": 0.01}],
    ids=["add", "affine", "clamp"],
)
def test_the_vector_shrinks_and_no_loss_rises(options):
    options = {"max_iters": 60, "lr": 0.1, "do_target_loss_sum": False} | options
    *first, before = optimize(**options)
    *found, info = optimize(do_output_constr=True, max_output_constr_iters=80, **options)
    assert info["iters"] == 60 and 0 < info["output_constr_iters"] <= 80
    flat = [[loss for pair in i["loss"] for side in pair for loss in side] for i in (before, info)]
    assert all(b <= a + 1e-6 * max(1, abs(a)) for a, b in zip(*flat, strict=True))
    size, start = (sum(float(part.norm()) for part in parts) for parts in (found, first))
    assert size < 0.99 * start
    assert info["norm"] == pytest.approx(float(found[0].norm()), rel=1e-5)


def test_steps_that_are_too_long_are_cut_and_resumed_exactly(tmp_path):
    options = {"max_iters": 60, "lr": 0.1, "affine_rank": 1, "do_output_constr": True}
    *truth, info = optimize(max_output_constr_iters=90, **options)
    start = optimize(max_iters=60, lr=0.1, affine_rank=1)
    assert sum(float(p.norm()) for p in truth) < 0.97 * sum(float(p.norm()) for p in start[:-1])
    for n in (30, 55, 90):  # the first ends after a restart
        *found, resumed = optimize(max_output_constr_iters=n, checkpoint=tmp_path / "run", **options)
    assert all(torch.equal(a, b) for a, b in zip(found, truth, strict=True))
    assert resumed["output_constr_iters"] == info["output_constr_iters"] and resumed["loss"] == info["loss"]


def test_a_phase_that_found_nothing_says_so(caplog):
    options = {"max_iters": 5, "lr": 0.05, "do_output_constr": True, "max_output_constr_iters": 25}
    vector, _ = optimize(output_constr_lr=50.0, **options)
    assert torch.equal(vector, optimize(max_iters=5, lr=0.05)[0])
    assert "smaller output_constr_lr (it was 50" in caplog.text


def test_without_time_the_first_phases_vector_comes_back():
    before = optimize(max_iters=5)
    vector, info = optimize(max_iters=5, do_output_constr=True, max_output_constr_iters=0)
    assert (
        torch.equal(vector, before[0])
        and info["output_constr_iters"] == 0
        and info["loss"] == before[1]["loss"]
    )


def test_a_norm_that_cannot_shrink_ends_it_after_twenty_iterations():
    _, info = optimize(max_iters=0, do_output_constr=True, output_constr_lr=1e-9)
    assert info["output_constr_iters"] == 20 and info["output_constr_stopped"] == "converged"


@pytest.mark.parametrize("own_backward", [False, True])
def test_custom_loss_functions_are_called_as_documented(own_backward):
    model, seen = build("llama"), []
    direction = torch.linspace(-1, 1, D_MODEL)

    def prepare(*arguments):
        seen.append(arguments)
        return {"along": direction}

    def cost(model, datapoints, layer, vector, matrix_left, matrix_right, only_hook_prompt, *, along):
        seen.append((model, datapoints, layer, vector, matrix_left, matrix_right, only_hook_prompt))
        loss = (vector @ along) + matrix_left.sum() * 0
        if own_backward:
            loss.backward()
            return float(loss.detach())
        return loss

    options = {
        "max_iters": 20,
        "lr": 0.05,
        "affine_rank": 1,
        "do_output_constr": True,
        "max_output_constr_iters": 15,
        "custom_output_constr_loss_func": cost,
        "custom_output_constr_pre_loss_func": prepare,
        "output_constr_norm_initial_scale": 1.1,
    }
    vector, *_ = optimize(layer=[1, 2], **options)
    start, *_ = optimize(layer=[1, 2], max_iters=20, lr=0.05, affine_rank=1)
    assert len(seen) == 17
    for arguments in seen:
        assert (
            arguments[0] is model
            and arguments[1] is DATA
            and arguments[2] == [1, 2]
            and arguments[6] is False
        )
        assert arguments[3].shape == (D_MODEL,) and arguments[4].shape == arguments[5].shape == (1, D_MODEL)
    assert all(float(arguments[3].detach().norm()) <= 1.1 * float(start.norm()) + 1e-5 for arguments in seen)
    assert float(vector @ direction) <= float(start @ direction)


def test_a_custom_loss_that_does_not_depend_on_the_vector_is_an_error():
    with pytest.raises(ValidationError, match="doesn't depend on the vector"):
        optimize(max_iters=1, do_output_constr=True, custom_output_constr_loss_func=lambda *_: 3.0)
    with pytest.raises(ValidationError, match="dict"):
        optimize(
            max_iters=1,
            do_output_constr=True,
            custom_output_constr_loss_func=lambda *_, **__: 3.0,
            custom_output_constr_pre_loss_func=lambda *_: 3,
        )


def melbo_by_hand(model, data, layer, target, edits) -> float:
    """Minus each completion's mean distance, summed, with plain hooks; ``edits`` makes the hook of a datapoint."""
    total = 0.0
    for datapoint in data:
        for text in [*datapoint.src_completions, *datapoint.dst_completions]:
            prompt, ids = encode_pair(TOKENIZER, datapoint.prompt, text)
            states = []
            for hooks in ([], [(layer, edits(datapoint))]):
                seen = []
                block = adapter_for(model).layers[target - 1]

                def note(module, args, out, seen=seen):
                    seen.append(out[0] if isinstance(out, tuple) else out)

                with torch.no_grad(), hf_hooks_contextmanager(model, hooks):
                    handle = block.register_forward_hook(note)
                    model(torch.tensor([prompt + ids]))
                    handle.remove()
                states.append(seen[0][0, len(prompt) - 1 :])
            total -= float((states[1] - states[0]).norm(dim=-1).mean())
    return total


@pytest.mark.parametrize("target", [3, 4])
@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_melbo_is_the_mean_distance_of_each_completion_at_the_target_layer(name, target):
    model, data = FAMILIES[name](), DATA[:2]
    assert (
        len({len(TOKENIZER.encode(text)) for d in data for text in d.src_completions + d.dst_completions}) > 1
    )
    hooks = n_hooks(model)  # transformers may have left some
    _, loss = make_melbo_loss_funcs(target)
    v = start_of(norm=3.0).requires_grad_()
    found = loss(model_with_tokenizer(model), data, 1, v, None, None, False)

    def edits(datapoint):
        return make_steering_hook_hf(-v.detach() if datapoint.is_negative else v.detach())

    assert float(found.detach()) == pytest.approx(melbo_by_hand(model, data, 1, target, edits), rel=1e-4)
    (slope,) = torch.autograd.grad(found, v)
    step = 1e-3 * slope / slope.norm()
    with torch.no_grad():
        ahead, behind = (float(loss(model, data, 1, v + s * step, None, None, False)) for s in (1, -1))
    assert (ahead - behind) / 2e-3 == pytest.approx(float(slope.norm()), rel=0.05)
    assert n_hooks(model) == hooks


def model_with_tokenizer(model):
    adapter_for(model).tokenizer = TOKENIZER
    return model


@pytest.mark.parametrize(
    "options", [{}, {"vector_clamp": 1.5}, {"affine_rank": 1}], ids=["add", "clamp", "affine"]
)
def test_melbo_moves_later_activations_further_without_raising_a_loss(options):
    prepare, loss = make_melbo_loss_funcs(-1)
    seen = []

    def watched(*arguments, **kwargs):
        seen.append(float(loss(*arguments, **kwargs).detach()))
        return loss(*arguments, **kwargs)

    *_, info = optimize(
        layer=1,
        max_iters=15,
        lr=0.05,
        do_output_constr=True,
        max_output_constr_iters=25,
        custom_output_constr_loss_func=watched,
        custom_output_constr_pre_loss_func=prepare,
        **options,
    )
    assert min(seen) < seen[0] < 0 and math.isfinite(info["loss"])


def test_melbo_inside_functions_of_the_users_knows_the_clamp_and_the_tokenizer_too():
    prepare, loss = make_melbo_loss_funcs(-1)
    options = {
        "layer": 1,
        "max_iters": 2,
        "do_output_constr": True,
        "max_output_constr_iters": 4,
        "vector_clamp": 1.5,
    }
    given = optimize(
        custom_output_constr_loss_func=loss, custom_output_constr_pre_loss_func=prepare, **options
    )
    wrapped = optimize(
        custom_output_constr_loss_func=lambda *args, **kwargs: loss(*args, **kwargs),
        custom_output_constr_pre_loss_func=lambda *args: prepare(*args),
        **options,
    )
    assert torch.equal(given[0], wrapped[0]) and given[1] == wrapped[1]


def test_melbo_needs_a_layer_above_the_steered_one():
    prepare, loss = make_melbo_loss_funcs(2)
    with pytest.raises(ValidationError, match="higher target_layer"):
        optimize(
            layer=2,
            max_iters=0,
            do_output_constr=True,
            custom_output_constr_loss_func=loss,
            custom_output_constr_pre_loss_func=prepare,
        )
