"""A step of vector optimization against one pass per completion, and against its own matrix products.

8 datapoints of one promoted and one suppressed completion each, on a 12-layer, 512-wide random Llama, layer 8.

pytest benchmarks/test_optimize.py
"""

from __future__ import annotations

import statistics
import time
from contextlib import ExitStack

import pytest
import torch
from interleaved import medians
from llama import llama_46m
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaForCausalLM

from mechanex.bundled import data_path
from mechanex.engine.datasets import read_pairs
from mechanex.engine.few_shot import few_shot_vectors
from mechanex.engine.models.adapter import undisturbed
from mechanex.engine.models.resolve import load
from mechanex.engine.optimize.loop import run_jobs
from mechanex.engine.optimize.objective import plain_sum
from mechanex.engine.optimize.passes import Passes
from mechanex.engine.optimize.problem import OptimizationJob
from mechanex.engine.optimize.settings import OptimizeSettings
from mechanex.engine.score import completion_logprobs
from mechanex.engine.vectors import SteeringVector
from mechanex.utils.steering_opt import TrainingDatapoint

LAYER, ROUNDS, COLDNESS, EPS = 8, 5, 0.7, 1e-6
# What counts as a matrix product: linear layers forward and backward, and attention.
PRODUCTS = (
    "aten::mm",
    "aten::addmm",
    "aten::addmm_",
    "aten::bmm",
    "aten::baddbmm",
    "aten::_scaled_dot_product",
)


def datapoints(prompt_tokens: int, n_datapoints: int = 8) -> list[TrainingDatapoint]:
    generator = torch.Generator().manual_seed(1)

    def draw(mean: int, spread: int) -> list[int]:
        n = int(torch.randint(mean - spread, mean + spread + 1, (), generator=generator))
        return torch.randint(3, 16_000, (n,), generator=generator).tolist()

    return [
        TrainingDatapoint(draw(prompt_tokens, prompt_tokens // 4), [draw(4, 1)], [draw(4, 1)])
        for _ in range(n_datapoints)
    ]


def one_by_one(model: LlamaForCausalLM, data: list[TrainingDatapoint], start: torch.Tensor):
    """A step the usual way: a pass of the whole model for each completion, a plain hook, weights not frozen."""
    vector = start.clone().requires_grad_()

    def hook(_module, args, kwargs):
        hidden = args[0] if args else kwargs["hidden_states"]
        steered = hidden + vector
        return ((steered, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": steered})

    handle = model.model.layers[LAYER].register_forward_pre_hook(hook, with_kwargs=True)
    total = 0.0
    for datapoint in data:
        for side, completions in (("src", datapoint.src_completions), ("dst", datapoint.dst_completions)):
            for ids in completions:
                logits = model(torch.tensor([datapoint.prompt + ids])).logits[
                    0, len(datapoint.prompt) - 1 : -1
                ]
                p = (logits * COLDNESS).softmax(-1).gather(1, torch.tensor(ids)[:, None])
                loss = -((p if side == "dst" else 1 - p) + EPS).log().sum()
                loss.backward()
                total += float(loss.detach())
    handle.remove()
    model.zero_grad(set_to_none=True)
    return total, vector.grad


def share_of_products(step, rounds: int = ROUNDS) -> float:
    """How many times as long a step takes as its matrix products, by the profiler's times of one and the same run."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(rounds):
            step()
    times = {event.key: event.self_cpu_time_total for event in found.key_averages()}
    products = sum(t for name, t in times.items() if name.startswith(PRODUCTS))
    return sum(times.values()) / products


@pytest.mark.parametrize("prompt_tokens", [12, 70])
def test_step(report, benchmark, prompt_tokens):
    model, data = llama_46m(), datapoints(prompt_tokens)
    job = OptimizationJob(model, data, LAYER, OptimizeSettings(seed=0))
    theta = job.start()
    with ExitStack() as stack:
        stack.enter_context(undisturbed(model))
        passes = stack.enter_context(Passes(job.adapter, [job.layers], 1024))

        def step():
            return passes.run([job.request(theta, plain_sum)])[0]

        def naive():
            # As a user's model is: its weights would get gradients.
            for parameter in model.parameters():
                parameter.requires_grad_(True)
            try:
                return one_by_one(model, data, theta)
            finally:
                for parameter in model.parameters():
                    parameter.requires_grad_(False)

        total, slope = naive()
        ours = step()
        assert sum(ours.losses) == pytest.approx(total, rel=1e-5)
        worst = float((ours.gradient - slope).norm() / slope.norm())
        assert worst < 1e-3, f"gradients differ by {worst:.1e}"
        found = medians({"one by one": naive, "mechanex": step}, ROUNDS)
        ratio = share_of_products(step)
    found["its matrix products alone"] = found["mechanex"] / ratio
    times = found["one by one"] / found["mechanex"]
    notes = {
        "mechanex": f"{times:.1f} times as fast; {ratio:.2f} times its products; gradients differ by {worst:.0e}"
    }
    report.add(
        f"optimization step, 8 x 2 completions, prompts of {prompt_tokens} tokens",
        found,
        "one by one",
        notes=notes,
    )
    benchmark.pedantic(lambda: None, rounds=1)


def test_jobs_together(report, benchmark):
    """Four layers at once against one after another."""
    model, data = llama_46m(), datapoints(12)
    jobs = [OptimizationJob(model, data, layer, OptimizeSettings(seed=0)) for layer in (5, 7, 9, 11)]
    with undisturbed(model), Passes(jobs[0].adapter, [job.layers for job in jobs], 4096) as passes:
        requests = [job.request(job.start(), plain_sum) for job in jobs]
        ways = {
            "one after another": lambda: [passes.run([request]) for request in requests],
            "together": lambda: passes.run(requests),
        }
        found = medians(ways, ROUNDS)
    report.add("optimization step of four layers, 8 x 2 completions", found, "one after another")
    benchmark.pedantic(lambda: None, rounds=1)


def test_jobs_over_other_data(report, benchmark):
    """Four jobs, each over datapoints of its own, in one pass against one after another."""
    model, data = llama_46m(), datapoints(12, 32)
    jobs = [
        OptimizationJob(model, data[8 * i : 8 * i + 8], layer, OptimizeSettings(seed=i))
        for i, layer in enumerate((5, 7, 9, 11))
    ]
    with undisturbed(model), Passes(jobs[0].adapter, [job.layers for job in jobs], 4096) as passes:
        passes.prepare([job.spec for job in jobs])
        requests = [job.request(job.start(), plain_sum) for job in jobs]
        ways = {
            "one after another": lambda: [passes.run([request]) for request in requests],
            "together": lambda: passes.run(requests),
        }
        for ours, alone in zip(ways["together"](), ways["one after another"](), strict=True):
            assert sum(ours.losses) == pytest.approx(sum(alone[0].losses), rel=1e-5)
        found = medians(ways, ROUNDS)
    report.add(
        "optimization step of four jobs over other data, 8 x 2 completions each", found, "one after another"
    )
    benchmark.pedantic(lambda: None, rounds=1)


def test_per_step_python(report, benchmark):
    """What a step costs beside its pass: the loop itself on a model so small that it hardly computes."""
    from families import build

    from mechanex.utils.steering_opt import optimize_vector

    data = [TrainingDatapoint([5, 6, 7], [[8]], [[9]])]
    optimize_vector(build("llama"), data, 3, max_iters=2, seed=0)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        optimize_vector(build("llama"), data, 3, max_iters=200, seed=0, eps=0)
        times.append((time.perf_counter() - start) / 200)
    median = statistics.median(times)
    report.add("optimization step of a tiny model, one layer", {"mechanex": median}, "mechanex")
    benchmark.pedantic(lambda: None, rounds=1)


def test_few_shot(report, benchmark):
    """``few-shot`` on 96 pairs at three layers of mx-tiny, beside all examples in each of 50 smaller steps."""
    loaded = load("mx-tiny", backend="transformers", device="cpu")
    model, tokenizer, layers = loaded.model, loaded.tokenizer, [2, 3, 4]
    train, held = (read_pairs(data_path("paris_rome"), split=part) for part in ("train", "heldout"))
    examples = train.prompts, train.positive_answers, train.negative_answers
    assert len(train) == 96
    data = [TrainingDatapoint(p, [bad], [good]) for p, good, bad in zip(*examples, strict=True)]
    made: dict[str, SteeringVector] = {}

    def few_shot():
        made["few-shot"] = few_shot_vectors(model, *examples, layers, tokenizer)

    def thorough():
        longest = made["few-shot"].norms()
        common = {"eps": 0.0, "do_one_minus": False, "max_iters": 50, "seed": 0}
        jobs = []
        for layer in layers:
            own = {"max_norm": longest[layer], "lr": 0.04 * longest[layer] / model.config.hidden_size**0.5}
            settings = OptimizeSettings(**common, **own)
            jobs.append(OptimizationJob(model, data, layer, settings, tokenizer))
        found = run_jobs(jobs)
        made["all examples, 50 steps"] = SteeringVector(
            {n: one[0] for n, one in zip(layers, found, strict=True)}
        )

    def gap():
        sides = [
            completion_logprobs(model, held.prompts, side, tokenizer).sums.mean()
            for side in (held.positive_answers, held.negative_answers)
        ]
        return float(sides[0] - sides[1])

    few_shot()
    found, spent = {}, {}
    for name, run in {"few-shot": few_shot, "all examples, 50 steps": thorough}.items():
        start, cpu = time.perf_counter(), time.process_time()
        run()
        found[name], spent[name] = time.perf_counter() - start, time.process_time() - cpu
    plain, notes = gap(), {}
    for name, vector in made.items():
        gains = []
        for layer in layers:
            with vector.restricted([layer]).apply(model):
                gains.append(gap() - plain)
        gained = ", ".join(f"{one:.1f}" for one in gains)
        notes[name] = f"{spent[name]:.1f} s of CPU; positive answers gain {gained} nats, held out"
    title = "few-shot, 96 pairs, 3 layers, mx-tiny"
    report.add(title, found, "all examples, 50 steps", notes=notes)
    benchmark.pedantic(lambda: None, rounds=1)
