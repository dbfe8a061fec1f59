"""Minibatches, checkpoints, several jobs at once, and TransformerLens models."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from families import D_MODEL, FAMILIES, build
from naive_optimization import Naive
from test_optimize_loop import DATA, TOKENIZER, optimize, start_of

from mechanex.engine.models import adapter_for
from mechanex.engine.optimize.compiled import CompiledBlock
from mechanex.engine.optimize.layout import Layout
from mechanex.engine.optimize.loop import run_jobs
from mechanex.engine.optimize.problem import Epoch, Minibatches, OptimizationJob
from mechanex.engine.optimize.settings import OptimizeSettings
from mechanex.engine.optimize.stack import StepGraphs
from mechanex.errors import ValidationError
from mechanex.utils.steering_opt import (
    TrainingDatapoint,
    optimize_vector_minibatch_hf,
    optimize_vectors,
)

# Minibatches

PROMPTS = ["The morning was", "She said that the", "A woman at", "The old man", "In the winter the snow"]


def minibatches(prompts=PROMPTS, size=2, model=None, **options):
    return optimize_vector_minibatch_hf(
        build("llama") if model is None else model,
        TOKENIZER,
        prompts,
        2,
        [" dark"],
        [" calm", " cold and quiet"],
        size,
        **({"seed": 0} | options),
    )


@pytest.mark.parametrize(
    ("name", "size"), [("llama", 1), ("llama", 3), ("llama", 5), ("llama", 12), ("bloom", 3), ("mamba", 3)]
)
def test_minibatch_steps_are_the_definitions_on_their_prompts(name, size):
    model = build(name)
    data = [TrainingDatapoint(p, [" dark"], [" calm", " cold and quiet"]) for p in PROMPTS]
    completions = optimize_job(model, data).completions
    sampler = Minibatches(completions, size, 0)
    v = start_of().requires_grad_()
    adam = torch.optim.Adam([v], lr=0.05)
    means = []
    for step in range(3):
        batch = [data[prompt] for _, prompt in sampler.prompts(step)]
        losses = Naive(model, TOKENIZER, adapter_for(model).layers, batch, (2,)).losses(v)
        means.append(float(sum(losses).detach()) / len(losses))
        adam.zero_grad()
        sum(losses).backward()
        adam.step()
    seen = []
    vector, info = minibatches(
        size=size, model=model, max_iters=3, lr=0.05, callback=lambda s, loss, v: seen.append(loss) and None
    )
    torch.testing.assert_close(vector, v.detach(), rtol=1e-3, atol=1e-3)
    assert seen[:3] == pytest.approx(means, rel=1e-4)
    everything = Naive(model, TOKENIZER, adapter_for(model).layers, data, (2,)).losses(vector)
    assert info["loss"] == pytest.approx(float(sum(everything).detach()) / len(everything), rel=1e-4)


def optimize_job(model, data):
    return OptimizationJob(model, data, 2, OptimizeSettings(), TOKENIZER)


def test_epochs_shuffle_after_the_first_and_roll_over():
    data = [TrainingDatapoint(p, [], [" calm"]) for p in PROMPTS]
    completions = optimize_job(build("llama"), data).completions
    sampler = Minibatches(completions, 3, 4)
    order = [place for step in range(10) for place in sampler.prompts(step)]
    by_epoch = [[p for e, p in order if e == epoch] for epoch in range(6)]
    assert by_epoch[0] == [0, 1, 2, 3, 4] and all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in by_epoch)
    assert len({tuple(epoch) for epoch in by_epoch}) > 2
    epoch, ends = Epoch(), []
    for step in range(10):
        losses = [100.0 * step + p for p in range(5)]
        done, epoch = sampler.collect(epoch, step, losses)
        if done is not None:
            ends.append(step)
            assert len(done) == 5 and all(math.isfinite(loss) for loss in done)
    assert ends == [1, 3, 4, 6, 8, 9]


def test_minibatch_options_and_stops():
    _, info = minibatches(max_iters=40, lr=0.05, target_loss=1e9)
    assert (info["iters"], info["stopped"]) == (
        2,
        "target_loss",
    )  # the first epoch ends with the third minibatch
    _, matrix, _ = minibatches(max_iters=2, affine_rank=2)
    assert matrix.shape == (D_MODEL, D_MODEL)
    assert minibatches(lr=1e-9, eps=1e-3)[1]["stopped"] == "converged"
    assert len(minibatches(max_iters=1, return_info=False)) == 1
    _, noisy = minibatches(max_iters=2, noise_scale=0.1)
    assert math.isfinite(noisy["loss"])
    with pytest.raises(TypeError, match="no_such_option"):
        minibatches(max_iters=1, no_such_option=1)


# Checkpoints


class Stop(Exception):
    pass


RESUMED = {
    "add": {},
    "affine, noise": {"affine_rank": 2, "noise_scale": 0.2, "do_antipgd": True},
    "histories": {"return_loss_history": True, "return_vec_history": True, "do_target_loss_sum": False},
    "watched": {"eval_datapoints": DATA[:1], "patience": 50},
    "ended by a plateau": {"plateau": 0.4},
}


@pytest.mark.parametrize("case", RESUMED)
@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
def test_interrupted_and_resumed_is_uninterrupted_bit_for_bit(case, error, tmp_path):
    options = {"max_iters": 12, "lr": 0.05} | RESUMED[case]
    truth = optimize(**options)
    path = tmp_path / "run.safetensors"
    for stop in (0, 3, 7):

        def callback(step, loss, vector, stop=stop):
            if step == stop:
                raise error

        with pytest.raises(error):
            optimize(checkpoint=path, callback=callback, **options)
    resumed = optimize(checkpoint=path, **options)
    same(resumed, truth)
    same(optimize(checkpoint=path, **options), truth)


def same(one, other):
    for a, b in zip(one[:-1], other[:-1], strict=True):
        assert torch.equal(a, b)
    ours, truth = one[-1], other[-1]
    assert ours.keys() == truth.keys()
    for name, value in truth.items():
        if name == "vec_history":
            assert all(torch.equal(a, b) for a, b in zip(ours[name], value, strict=True))
        elif isinstance(value, torch.Tensor):
            assert torch.equal(ours[name], value)
        else:
            assert ours[name] == value, name


def test_the_constrained_phase_and_minibatches_resume_too(tmp_path):
    options = {"max_iters": 8, "lr": 0.05, "do_output_constr": True, "max_output_constr_iters": 14}
    truth, calls = optimize(**options), []

    def slow_down(model, args):
        calls.append(1)
        if len(calls) == 15:
            raise Stop

    handle = build("llama").model.layers[3].register_forward_pre_hook(slow_down)
    try:
        with pytest.raises(Stop):
            optimize(checkpoint=tmp_path / "a", **options)
    finally:
        handle.remove()
    same(optimize(checkpoint=tmp_path / "a", **options), truth)
    truth = minibatches(max_iters=9, lr=0.05)
    for n in (2, 5):
        minibatches(max_iters=n, lr=0.05, checkpoint=tmp_path / "b")
    same(minibatches(max_iters=9, lr=0.05, checkpoint=tmp_path / "b"), truth)


def test_a_checkpoint_keeps_the_seed_and_is_refused_elsewhere(tmp_path):
    path = tmp_path / "run.safetensors"
    first = optimize(seed=None, max_iters=3, checkpoint=path)
    longer = optimize(seed=None, max_iters=6, checkpoint=path)
    assert longer[1]["seed"] == first[1]["seed"]
    assert torch.equal(longer[0], optimize(seed=first[1]["seed"], max_iters=6)[0])
    for other in (
        {"lr": 0.5},
        {"layer": 1},
        {"data": DATA[:1]},
        {"seed": 12345},
        {"starting_vec": torch.ones(D_MODEL)},
        {"return_loss_history": True},
        {"return_vec_history": True},
        {"eval_datapoints": DATA[:1]},
        {"lr_schedule": lambda step: 1.0},
    ):
        with pytest.raises(ValidationError, match="another optimization"):
            optimize(**({"seed": None, "max_iters": 6, "checkpoint": path} | other))
    other = FAMILIES["llama"]()
    other.model.layers[3].mlp.down_proj.weight.data *= 1.01
    with pytest.raises(ValidationError, match="another optimization"):
        optimize(other, seed=None, max_iters=6, checkpoint=path)
    with pytest.raises(ValidationError, match="is a folder; name a file"):
        optimize(max_iters=1, checkpoint=tmp_path)
    with pytest.raises(ValidationError, match="can't be written"):
        optimize(max_iters=1, checkpoint=path / "below a file")
    path.write_bytes(b"nonsense")
    with pytest.raises(ValidationError, match="not a readable checkpoint"):
        optimize(max_iters=1, checkpoint=path)


def test_functions_are_told_apart_by_their_code(tmp_path):
    def half(step):
        return 0.5

    def full(step):
        return 1.0

    options = {"max_iters": 2, "checkpoint": tmp_path / "run"}
    optimize(lr_schedule=half, **options)
    full.__qualname__ = half.__qualname__
    with pytest.raises(ValidationError, match="another optimization"):
        optimize(lr_schedule=full, **options)
    optimize(lr_schedule=half, **options)


def test_more_steps_of_the_first_phase_go_on_before_the_second(tmp_path):
    options = {"lr": 0.05, "do_output_constr": True, "max_output_constr_iters": 4}
    optimize(max_iters=5, checkpoint=tmp_path / "run", **options)
    same(optimize(max_iters=9, checkpoint=tmp_path / "run", **options), optimize(max_iters=9, **options))


# Several jobs at once


def test_jobs_together_are_each_what_they_are_alone():
    other = [TrainingDatapoint("The old man", dst_completions=[" sold apples"])]
    jobs = [
        {"layer": 2, "seed": 0},
        {"layer": 1, "seed": 1, "max_iters": 4},
        {"layer": [0, 3], "seed": 2, "affine_rank": 2},
        {"layer": 3, "seed": 3, "vector_clamp": 1.4},
        {"layer": 4, "seed": 8},
        {"layer": [3, 4], "seed": 9},
        {"layer": 2, "starting_vec": start_of(9, 2.0), "seed": 0, "coldness": 1.0},
        {"layer": 1, "seed": 4, "datapoints": other},
        {"layer": 2, "seed": 5, "noise_scale": 0.3},
        {"layer": 1, "seed": 6, "normalize_completion_length": True, "target_loss": 10.0},
        {"layer": 2, "seed": 7, "do_output_constr": True, "max_output_constr_iters": 3},
    ]
    jobs = [{"datapoints": DATA, "max_iters": 7, "lr": 0.05} | job for job in jobs]
    for model in (build("llama"), build("bloom"), build("mamba")):
        together = optimize_vectors(model, jobs, TOKENIZER)
        for job, found in zip(jobs, together, strict=True):
            options = dict(job)
            alone = optimize(model, options.pop("datapoints"), options.pop("layer"), **options)
            for a, b in zip(found[:-1], alone[:-1], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
            assert found[-1]["iters"] == alone[-1]["iters"] and found[-1]["stopped"] == alone[-1]["stopped"]
            assert found[-1]["loss"] == pytest.approx(alone[-1]["loss"], rel=1e-4)


def test_jobs_over_the_same_data_share_each_pass():
    model = build("llama")
    passes, n_rows = [], len(Layout(adapter_for(model), optimize_job(model, DATA).spec).packs[0].slots)
    optimize(model, max_iters=0)  # what is found out about the model once takes passes too
    handle = model.model.layers[3].register_forward_pre_hook(lambda m, args: passes.append(args[0].shape[0]))
    optimize_vectors(
        model, [{"datapoints": DATA, "layer": n, "max_iters": 5, "seed": n} for n in (1, 2, 3)], TOKENIZER
    )
    handle.remove()
    assert len(passes) == 6 and set(passes) == {3 * n_rows}


OTHERS = [
    [TrainingDatapoint("The old man", dst_completions=[" sold apples"])],
    [TrainingDatapoint("In the winter", [" sings"], [" the snow covers the roofs"], is_negative=True)],
]


@pytest.mark.parametrize("minibatch", [None, 2])
def test_jobs_over_other_data_and_minibatches_share_each_pass(minibatch):
    """At the highest layer as many calls as steps, whatever the jobs' data, layers and seeds; vectors as alone."""
    model = build("llama")
    data = [DATA, DATA, *OTHERS]

    def jobs():
        settings = [OptimizeSettings(max_iters=4, lr=0.05, seed=n) for n in range(len(data))]
        layers = [2, 1, 3, 1]
        return [
            OptimizationJob(model, one, layer, each, TOKENIZER, minibatch_size=minibatch)
            for one, layer, each in zip(data, layers, settings, strict=True)
        ]

    alone = [run_jobs([job])[0] for job in jobs()]
    calls = []
    handle = model.model.layers[3].register_forward_pre_hook(lambda *_: calls.append(1))
    together = run_jobs(jobs())
    handle.remove()
    # Minibatches: the whole losses of each job at its end come in a pass of their own.
    assert len(calls) == 5 + (0 if minibatch is None else len(data))
    for (vector, info), (own, expected) in zip(together, alone, strict=True):
        torch.testing.assert_close(vector, own, rtol=1e-4, atol=1e-5)
        assert info["loss"] == pytest.approx(expected["loss"], rel=1e-5) and info["iters"] == 4


def test_minibatches_of_the_same_completions_in_other_datapoints():
    model = build("llama")
    one = [TrainingDatapoint("The old man", dst_completions=[" sold apples", " sings"])]
    two = [TrainingDatapoint("The old man", dst_completions=[text]) for text in (" sold apples", " sings")]

    def jobs():
        settings = OptimizeSettings(max_iters=3, lr=0.05, seed=0)
        return [OptimizationJob(model, data, 2, settings, TOKENIZER, minibatch_size=1) for data in (one, two)]

    alone = [run_jobs([job])[0] for job in jobs()]
    for (vector, info), (own, expected) in zip(run_jobs(jobs()), alone, strict=True):
        torch.testing.assert_close(vector, own, rtol=1e-4, atol=1e-5)
        assert info["loss"] == pytest.approx(expected["loss"], rel=1e-5)


def test_a_job_whose_vector_is_lost_leaves_the_others_alone():
    """Its losses and gradients become NaN in a pass that others share."""
    model = build("gpt2")

    def jobs():
        return [
            OptimizationJob(model, data, 2, OptimizeSettings(max_iters=4, lr=lr, seed=0), TOKENIZER)
            for data, lr in ((DATA, 0.05), (OTHERS[0], 1e37), (OTHERS[1], 0.05))
        ]

    alone = [run_jobs([job])[0] for job in jobs()]
    assert [info["stopped"] for _, info in alone] == ["max_iters", "not finite", "max_iters"]
    for (vector, info), (own, expected) in zip(run_jobs(jobs()), alone, strict=True):
        torch.testing.assert_close(vector, own, rtol=1e-4, atol=1e-5)
        assert (info["iters"], info["stopped"]) == (expected["iters"], expected["stopped"])


def test_a_pass_holds_no_more_tokens_than_asked():
    model = build("llama")
    rows = []
    handle = model.model.layers[3].register_forward_pre_hook(
        lambda m, args: rows.append(args[0].shape[:2].numel())
    )
    jobs = [{"datapoints": DATA, "layer": 2, "max_iters": 2, "seed": n, "batch_tokens": 90} for n in range(5)]
    together = optimize_vectors(model, jobs, TOKENIZER)
    handle.remove()
    assert max(rows) <= 90
    for n, (vector, _) in enumerate(together):
        torch.testing.assert_close(vector, optimize(max_iters=2, seed=n)[0], rtol=1e-4, atol=1e-4)


def test_a_model_that_cannot_be_replayed_runs_jobs_together_too():
    from test_forward import with_a_side_channel

    model = with_a_side_channel()
    jobs = [{"datapoints": DATA, "layer": n, "max_iters": 3, "seed": n, "lr": 0.05} for n in (1, 2, 4)]
    for n, (vector, _) in zip((1, 2, 4), optimize_vectors(model, jobs, TOKENIZER), strict=True):
        torch.testing.assert_close(
            vector, optimize(model, layer=n, max_iters=3, seed=n, lr=0.05)[0], rtol=1e-4, atol=1e-4
        )


def test_ctrl_c_ends_all_jobs_and_keeps_what_they_have():
    def callback(step, loss, vector):
        if step == 3:
            raise KeyboardInterrupt

    jobs = [
        {"datapoints": DATA, "layer": n, "max_iters": 9, "seed": n, "keep_on_interrupt": True} for n in (1, 2)
    ]
    jobs[1]["callback"] = callback
    found = optimize_vectors(build("llama"), jobs, TOKENIZER)
    assert [info["stopped"] for _, info in found] == ["interrupted"] * 2


def test_bad_jobs_are_named():
    one = {"datapoints": DATA, "layer": 1}
    with pytest.raises(ValidationError, match=r"Job 1: it has no layer"):
        optimize_vectors(build("llama"), [{"datapoints": DATA, "layer": 1}, {"datapoints": DATA}], TOKENIZER)
    with pytest.raises(ValidationError, match=r"Job 0: Layer 9"):
        optimize_vectors(build("llama"), [{"datapoints": DATA, "layer": 9}], TOKENIZER)
    with pytest.raises(TypeError, match=r"Job 1: There is no option 'lrr'. Did you mean 'lr'\?"):
        optimize_vectors(build("llama"), [one, one | {"lrr": 1}], TOKENIZER)
    with pytest.raises(ValidationError, match="Job 0 and job 2 have one checkpoint"):
        shared = one | {"checkpoint": "run"}
        optimize_vectors(build("llama"), [shared, one, one | {"checkpoint": "./run"}], TOKENIZER)
    with pytest.raises(ValidationError, match="Job 0 is a str"):
        optimize_vectors(build("llama"), "ab", TOKENIZER)
    with pytest.raises(ValidationError, match="nothing to optimize"):
        optimize_vectors(build("llama"), [], TOKENIZER)


# TransformerLens


def test_transformer_lens_models_give_the_same_vectors():
    from test_lens import bridge_of, lens

    if not lens.installed():
        pytest.skip("transformer-lens (the lens extra) is not installed")
    for name in ("llama", "gpt2"):
        for options in ({}, {"vector_clamp": 1.5, "layer": [1, 2]}):
            ours = optimize(bridge_of(name), max_iters=3, lr=0.05, use_transformer_lens=True, **options)
            truth = optimize(build(name), max_iters=3, lr=0.05, **options)
            torch.testing.assert_close(ours[0], truth[0], rtol=1e-3, atol=1e-3)
            assert ours[1]["loss"] == pytest.approx(truth[1]["loss"], rel=1e-3)


def test_a_hooked_transformer_of_version_3_is_optimized():
    from test_lens import HookedTransformer

    torch.manual_seed(4)
    model = HookedTransformer().eval()
    data = [
        TrainingDatapoint([5, 9, 30], [[8, 2]], [[12], [90, 31, 7]]),
        TrainingDatapoint([44, 45], [], [[3, 3]], token=-1),
    ]
    start = start_of()
    vector, info = optimize(model, data, 1, max_iters=3, lr=0.05, starting_vec=start)
    truth = Naive(model, None, model.blocks, data, (1,))
    vectors, losses, _ = truth.optimize(start, 3, 0.05)
    torch.testing.assert_close(vector, vectors[-1], rtol=1e-3, atol=1e-3)
    assert info["loss"] == pytest.approx(losses[-1], rel=1e-4)


# GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu_it_is_what_it_is_on_the_cpu(dtype, caplog):
    model = FAMILIES["llama"]().to("cuda", dtype)
    with caplog.at_level("INFO", "mechanex"):
        vector, info = optimize(model, max_iters=5, lr=0.05)
    truth, expected = optimize(max_iters=5, lr=0.05)
    assert vector.device.type == "cuda" and vector.dtype == torch.float32
    assert "not captured" not in caplog.text
    assert info["loss"] == pytest.approx(expected["loss"], rel=1e-3 if dtype == torch.float32 else 0.05)
    if dtype == torch.float32:
        torch.testing.assert_close(vector.cpu(), truth, rtol=1e-2, atol=1e-3)


# Compiled layers


@pytest.fixture
def captured(monkeypatch):
    """Steps run as if they were captured: what would be, is what runs."""

    def of(self, run, inputs, captured=None):
        return captured or run

    monkeypatch.setattr(StepGraphs, "of", of)


@pytest.fixture
def compiled(monkeypatch):
    """How often torch was asked to compile a layer, for steps whose layers are to be compiled."""
    asked, compile_as_is = [], torch.compile

    def compile(block, **options):
        asked.append(block)
        return compile_as_is(block, backend="aot_eager", **options)

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setenv("MECHANEX_COMPILE_STEPS", "1")
    torch._dynamo.reset()
    yield asked
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.usefixtures("captured")
@pytest.mark.parametrize("layer", [2, [1, 3]])
def test_compiled_layers_give_the_same_vector(compiled, layer, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "mechanex.engine.optimize")
    model = build("llama")
    vector, info = optimize(model, layer=layer, max_iters=4, lr=0.05)
    first = layer if isinstance(layer, int) else layer[0]
    assert len(compiled) >= len(adapter_for(model).layers) - first
    assert "forward pass was compiled in" in caplog.text
    monkeypatch.delenv("MECHANEX_COMPILE_STEPS")
    n = len(compiled)
    plain, plainly = optimize(build("llama"), layer=layer, max_iters=4, lr=0.05)
    assert len(compiled) == n
    torch.testing.assert_close(vector, plain, rtol=1e-4, atol=1e-4)
    assert info["loss"] == pytest.approx(plainly["loss"], rel=1e-4)


def test_layers_are_not_compiled_where_no_step_is_captured(compiled, monkeypatch):
    vector, _ = optimize(build("llama"), max_iters=2)
    assert not compiled
    monkeypatch.delenv("MECHANEX_COMPILE_STEPS")
    plain, _ = optimize(build("llama"), max_iters=2)
    assert torch.equal(vector, plain)


@pytest.mark.usefixtures("captured")
def test_a_layer_that_torch_can_not_compile_runs_as_it_is(monkeypatch, caplog):
    def broken(block, **options):
        def run(*args, **kwargs):
            raise RuntimeError("no compiler here")

        return run

    plain, _ = optimize(build("llama"), max_iters=2)
    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setenv("MECHANEX_COMPILE_STEPS", "1")
    vector, _ = optimize(build("llama"), max_iters=2)
    assert torch.equal(vector, plain)
    assert "no compiler here" in caplog.text


def test_a_layer_of_which_nothing_is_compiled_says_no_time(monkeypatch, caplog):
    monkeypatch.setattr(torch, "compile", lambda block, **options: block)
    caplog.set_level(logging.INFO, "mechanex.engine.optimize")
    block = CompiledBlock(torch.nn.Linear(2, 2))
    block(torch.ones(1, 2))
    assert not caplog.records
