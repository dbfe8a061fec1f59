"""Losses and gradients of vector optimization: equal to the definitions and to finite differences, for every option."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from families import D_MODEL, FAMILIES, build, tiny_tokenizer
from naive_optimization import Naive

from mechanex.engine.models import adapter_for
from mechanex.engine.models.adapter import undisturbed
from mechanex.engine.optimize.layout import Layout
from mechanex.engine.optimize.objective import noise_of_step, plain_sum
from mechanex.engine.optimize.passes import Evaluation, Passes
from mechanex.engine.optimize.problem import OptimizationJob
from mechanex.engine.optimize.settings import OptimizeSettings
from mechanex.utils.steering_opt import TrainingDatapoint

TOKENIZER = tiny_tokenizer()
PLAIN = [
    TrainingDatapoint(
        "The morning was", dst_completions=[" calm.", " cold and quiet"], src_completions=[" dark"]
    ),
    TrainingDatapoint("She said that the bread", src_completions=[" was warm", " fell"]),
    TrainingDatapoint("A woman", dst_completions=[" opened the window"]),
]
MASKED = [
    TrainingDatapoint("The morning was cold", dst_completions=[" calm.", " quiet"], token=-1),
    TrainingDatapoint("The morning was cold", src_completions=[" dark"], token=slice(1, None, 2)),
    TrainingDatapoint("A woman at the river", dst_completions=[" sings"], token=slice(-2, None)),
]
NEGATIVE = [
    TrainingDatapoint("The morning was", dst_completions=[" calm."], is_negative=True),
    TrainingDatapoint("The morning was", src_completions=[" calm.", " dark"]),
    TrainingDatapoint("A woman", src_completions=[" opened"], is_negative=True, token=slice(0, 2)),
]
CASES = {
    "add": (PLAIN, 2, {}),
    "one_minus": (PLAIN, 2, {"do_one_minus": False}),
    "eps_0": (PLAIN, 1, {"eps": 0.0, "coldness": 1.3}),
    "normalized": (PLAIN, 0, {"normalize_token_length": True, "eps": 0.05}),
    "satisfice": (PLAIN, 2, {"satisfice": True, "target_loss": 3.0}),
    "clamp": (PLAIN, 2, {"vector_clamp": 1.7}),
    "negative clamp value": (NEGATIVE, 1, {"vector_clamp": -0.6}),
    "affine": (PLAIN, 2, {"affine_rank": 3}),
    "layers": (PLAIN, [1, 3], {}),
    "layers, clamp": (PLAIN, [0, 2, 3], {"vector_clamp": 0.8}),
    "layers, affine": (NEGATIVE, [1, 2], {"affine_rank": 2}),
    "masked": (MASKED, 1, {}),
    "masked, clamp": (MASKED, [1, 2], {"vector_clamp": 1.2}),
    "prompt only": (PLAIN, 1, {"only_hook_prompt": True}),
    "prompt only, masked": (MASKED, 1, {"only_hook_prompt": True, "affine_rank": 1}),
    "negative": (NEGATIVE, 2, {}),
    "leaving the last block": (MASKED, 4, {"affine_rank": 1}),
    "everywhere, clamp": (PLAIN, [0, 1, 2, 3, 4], {"vector_clamp": 0.8}),
    "negative, affine": (NEGATIVE, 2, {"affine_rank": 2}),
}


@cache
def doubled(name: str = "gpt2"):
    """In float64 throughout; Llama's norms are in float32 always."""
    return FAMILIES[name]().double()


def evaluate(job: OptimizationJob, theta: torch.Tensor, **changes) -> Evaluation:
    from dataclasses import replace

    with undisturbed(job.adapter.hf_model), Passes(job.adapter, [job.layers], 1024) as passes:
        request = job.request(theta, changes.pop("objective", job.objective))
        return passes.run([replace(request, **changes)])[0]


def naive_of(job: OptimizationJob) -> Naive:
    settings = job.settings
    return Naive(
        job.adapter.model,
        TOKENIZER,
        job.adapter.layers,
        job.datapoints,
        job.layers,
        settings.vector_clamp,
        settings.coldness,
        settings.eps,
        settings.do_one_minus,
        settings.normalize_token_length,
        settings.only_hook_prompt,
    )


def parts(job: OptimizationJob, theta: torch.Tensor):
    factors = job.parameters.factors(theta)
    return job.parameters.vector(theta), None if factors is None else factors[0].T @ factors[1]


def total(job: OptimizationJob, losses: list[torch.Tensor]) -> torch.Tensor:
    stacked = torch.stack(losses)
    return (stacked - job.settings.target_loss).square().sum() if job.settings.satisfice else stacked.sum()


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_equal_the_definition_and_finite_differences(case):
    datapoints, layer, options = CASES[case]
    job = OptimizationJob(
        doubled(), datapoints, layer, OptimizeSettings(seed=3, starting_norm=2.0, **options), TOKENIZER
    )
    theta = job.start()
    found = evaluate(job, theta)
    assert theta.dtype == torch.float64 and found.finite
    naive = naive_of(job)
    leaf = theta.clone().requires_grad_()
    losses = naive.losses(*parts(job, leaf))
    torch.testing.assert_close(
        torch.tensor(found.losses, dtype=torch.float64), torch.stack(losses).detach(), rtol=1e-9, atol=1e-9
    )
    (truth,) = torch.autograd.grad(total(job, losses), leaf)
    torch.testing.assert_close(found.gradient, truth, rtol=1e-8, atol=1e-9)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):
            direction = torch.randn(len(theta), generator=generator, dtype=torch.float64)
            direction /= direction.norm()
            step = 1e-5
            ahead, behind = (
                total(
                    job,
                    torch.tensor(
                        evaluate(job, theta + s * step * direction).losses, dtype=torch.float64
                    ).unbind(),
                )
                for s in (1, -1)
            )
            difference = float(ahead - behind) / (2 * step)
            slope = float(found.gradient @ direction)
            assert abs(difference - slope) <= 1e-6 * max(1.0, abs(slope)), (difference, slope)


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "bloom", "mamba", "qwen3_moe", "cohere"])
@pytest.mark.parametrize(
    "options", [{}, {"vector_clamp": 1.5}, {"affine_rank": 2}], ids=["add", "clamp", "affine"]
)
def test_every_kind_of_model_gives_the_definitions_gradients(name, options):
    job = OptimizationJob(
        build(name),
        PLAIN + NEGATIVE,
        [1, 2],
        OptimizeSettings(seed=1, starting_norm=2.0, **options),
        TOKENIZER,
    )
    theta = job.start()
    found = evaluate(job, theta)
    leaf = theta.clone().requires_grad_()
    losses = naive_of(job).losses(*parts(job, leaf))
    torch.testing.assert_close(torch.tensor(found.losses), torch.stack(losses).detach(), rtol=1e-4, atol=1e-4)
    (truth,) = torch.autograd.grad(torch.stack(losses).sum(), leaf)
    assert (found.gradient - truth).norm() <= 2e-4 * truth.norm()


def test_a_model_that_cannot_be_replayed_runs_whole():
    from test_forward import with_a_side_channel

    model = with_a_side_channel()
    job = OptimizationJob(model, PLAIN, 2, OptimizeSettings(seed=1), TOKENIZER)
    theta = job.start()
    found = evaluate(job, theta)
    leaf = theta.clone().requires_grad_()
    losses = naive_of(job).losses(leaf)
    torch.testing.assert_close(torch.tensor(found.losses), torch.stack(losses).detach(), rtol=1e-4, atol=1e-4)


def test_small_batches_accumulate_to_the_same_gradient():
    job = OptimizationJob(doubled(), PLAIN, 1, OptimizeSettings(seed=0), TOKENIZER)
    small = OptimizationJob(doubled(), PLAIN, 1, OptimizeSettings(seed=0, batch_tokens=1), TOKENIZER)
    one, many = evaluate(job, job.start()), evaluate(small, small.start())
    n_packs = [len(Layout(job.adapter, each.spec).packs) for each in (job, small)]
    assert n_packs[0] == 1 and n_packs[1] >= 3
    torch.testing.assert_close(one.gradient, many.gradient, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(torch.tensor(one.losses), torch.tensor(many.losses))


@pytest.mark.parametrize(
    "options", [{}, {"affine_rank": 2}, {"vector_clamp": 2.0}], ids=["add", "affine", "clamp"]
)
def test_each_completions_gradient_by_the_effect_that_noise_is_added_to(options):
    settings = OptimizeSettings(seed=0, noise_scale=1.0, **options)
    job = OptimizationJob(doubled(), PLAIN + NEGATIVE, [1, 3], settings, TOKENIZER)
    theta = job.start()
    found = evaluate(job, theta, objective=plain_sum, by_effect=True)
    truth = naive_of(job)
    for i, place in enumerate(truth.completions()):
        noise = torch.zeros(D_MODEL, dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(truth.loss(*place, *parts(job, theta), noise), noise)
        torch.testing.assert_close(found.gradient[i], slope, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("options", [{}, {"vector_clamp": 2.0}], ids=["add", "clamp"])
def test_noise_is_added_to_the_effect_of_each_completions_edit(options):
    job = OptimizationJob(
        doubled(), PLAIN + NEGATIVE, 2, OptimizeSettings(seed=0, noise_scale=1.0, **options), TOKENIZER
    )
    theta = job.start()
    noise = torch.randn(len(job.completions), D_MODEL, dtype=torch.float64)
    found = evaluate(job, theta, noise=noise)
    naive = naive_of(job)
    truth = [naive.loss(*place, theta, None, noise[i]) for i, place in enumerate(naive.completions())]
    torch.testing.assert_close(
        torch.tensor(found.losses, dtype=torch.float64), torch.stack(truth), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize(
    "options", [{}, {"affine_rank": 2}, {"vector_clamp": 1.3}], ids=["add", "affine", "clamp"]
)
def test_small_tangent_noise_leaves_the_losses_as_they_are(options):
    settings = OptimizeSettings(seed=0, noise_scale=1e-4, noise_iters=8, **options)
    job = OptimizationJob(doubled(), PLAIN + NEGATIVE, 2, settings, TOKENIZER)
    theta = job.start()
    slopes = evaluate(job, theta, objective=plain_sum, by_effect=True).gradient
    before = torch.tensor(evaluate(job, theta).losses)

    def change(gradient: torch.Tensor | None) -> float:
        drawn = noise_of_step(settings, 0, 0, gradient, theta.new_empty(len(before), D_MODEL))
        after = torch.stack([torch.tensor(evaluate(job, theta, noise=noise).losses) for noise in drawn])
        return float((after - before).square().mean().sqrt())

    assert change(slopes) < 1e-3 * change(None)


def test_no_weight_gets_a_gradient_buffer_and_flags_come_back():
    model = FAMILIES["llama"]()
    model.lm_head.weight.requires_grad_(False)
    before = [p.requires_grad for p in model.parameters()]
    job = OptimizationJob(model, PLAIN, 1, OptimizeSettings(seed=0), TOKENIZER)
    seen = []
    handle = model.model.layers[3].register_forward_pre_hook(
        lambda *_: seen.append(any(p.requires_grad for p in model.parameters()))
    )
    evaluate(job, job.start())
    handle.remove()
    assert seen and not any(seen[1:])
    assert all(p.grad is None for p in model.parameters())
    assert [p.requires_grad for p in model.parameters()] == before


def test_the_lower_layers_run_once_and_the_head_only_on_scored_rows():
    model = build("llama")
    adapter_for(model).findings.clear()
    job = OptimizationJob(model, PLAIN, 2, OptimizeSettings(seed=0), TOKENIZER)
    calls = {1: 0, 3: 0}
    handles = [
        model.model.layers[n].register_forward_pre_hook(lambda *_, n=n: calls.__setitem__(n, calls[n] + 1))
        for n in calls
    ]
    heads = []
    handles.append(model.lm_head.register_forward_pre_hook(lambda m, args: heads.append(args[0].shape)))
    evaluate(job, job.start())  # what the model can do is tried, which runs all of it
    heads.clear()
    calls.update({1: 0, 3: 0})
    with undisturbed(model), Passes(job.adapter, [job.layers], 1024) as passes:
        for _ in range(5):
            passes.run([job.request(job.start(), plain_sum)])
    for handle in handles:
        handle.remove()
    assert calls[1] == 1 and calls[3] >= 5 and heads == []


@pytest.mark.parametrize("starts", [(2,), (1, 3)])
def test_kept_residuals_have_a_bound_in_bytes_and_packs_beyond_it_give_the_same(starts):
    model = build("llama")
    adapter_for(model).findings.clear()
    datapoints = [TrainingDatapoint("A woman sang " * n, dst_completions=[" calm."]) for n in (1, 4, 7)]
    jobs = [
        OptimizationJob(model, datapoints, n, OptimizeSettings(seed=0, batch_tokens=64), TOKENIZER)
        for n in starts
    ]

    def run(most_bytes):
        with (
            undisturbed(model),
            Passes(jobs[0].adapter, [job.layers for job in jobs], 64, most_bytes=most_bytes) as passes,
        ):
            found = [passes.run([job.request(job.start(), plain_sum)])[0] for job in jobs]
            return passes.kept_bytes, found

    whole, free = run(None)
    assert whole > 0
    for most in (0, whole // 2):
        kept, bounded = run(most)
        assert kept <= most and (kept > 0) == (most > 0)
        for ours, truth in zip(bounded, free, strict=True):
            assert ours.losses == pytest.approx(truth.losses, rel=1e-5)
            torch.testing.assert_close(ours.gradient, truth.gradient, rtol=1e-4, atol=1e-6)
