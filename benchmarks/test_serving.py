"""A server beside ``generate_batch``, and under 64 streaming clients, a minute steered and a minute not.

pytest benchmarks/test_serving.py
"""

from __future__ import annotations

import random
import statistics
import time

import pytest
import torch
from interleaved import medians
from server_calls import call
from server_process import serving
from serving_data import NAMES, tone_vectors
from serving_load import Job, load, prompt_of
from serving_models import MODELS

from mechanex.engine.generate import generate_batch
from mechanex.engine.models.resolve import load as load_model

N_CLIENTS, N_TOKENS = 64, 40
LEAST = {("mx-tiny", 1): 0.9, ("mx-tiny", 64): 0.65, ("llama 110 M", 1): 0.9, ("llama 110 M", 64): 0.85}
ROUNDS, SLICE = 12, 5.0  # in every round a slice without steering and one with: a minute of each


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as the server is started, whose clients and event loop need the other cores
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("n_clients", [1, N_CLIENTS])
@pytest.mark.parametrize(("name", "rounds"), [("mx-tiny", 15), ("llama 110 M", 5)])
def test_a_server_against_generate_batch(report, one_thread, tmp_path, name, rounds, n_clients):
    """The same prompts, answered by both in turns; the server streams each to a client of its own."""
    folder = MODELS[name](tmp_path / "model")
    local = load_model(str(folder), backend="transformers", device="cpu")
    if name == "mx-tiny":
        prompts = [prompt_of(i, 20, local.tokenizer) for i in range(n_clients)]
    else:
        prompts = [" ".join(f"w{97 * i + 31 * k}" for k in range(20)) for i in range(n_clients)]
    jobs = [Job(prompt, max_tokens=N_TOKENS) for prompt in prompts]

    def batch():
        generate_batch(local.model, local.tokenizer, prompts, max_tokens=N_TOKENS, sampling_method="greedy")

    with serving("--log-level", "warning", home=tmp_path / "home", model=str(folder)) as server:

        def served():
            answers, _ = load(server.port, jobs, n_clients, 0)
            assert all(a.done and a.tokens == N_TOKENS for a in answers), answers[0]

        found = medians({"generate_batch": batch, "server": served}, rounds)
    rates = {way: f"{n_clients * N_TOKENS / each:.0f} tokens/s" for way, each in found.items()}
    title = f"{n_clients} rows of {N_TOKENS} tokens, {name}, through a server and as one batch"
    report.add(title, found, "generate_batch", notes=rates)
    assert found["generate_batch"] / found["server"] >= LEAST[name, n_clients]


@pytest.mark.parametrize("n_prompt", [20, 200])
def test_serving(report, tmp_path, n_prompt):
    local = load_model("mx-tiny", backend="transformers", device="cpu")
    tone_vectors(local.model, local.tokenizer, tmp_path / "vectors")
    # All different: equal ones would be read once for several clients.
    prompts = [prompt_of(i, n_prompt, local.tokenizer) for i in range(N_CLIENTS)]
    assert len(set(prompts)) == N_CLIENTS
    plain = [Job(prompt, max_tokens=N_TOKENS, fixed=True) for prompt in prompts]
    steered = [
        Job(prompt, NAMES[i % 4], (-1.5, 1.0)[i // 4 % 2], max_tokens=N_TOKENS, fixed=True)
        for i, prompt in enumerate(prompts)
    ]
    seconds: dict[str, float] = {}
    arguments = ("--vectors", str(tmp_path / "vectors"), "--log-level", "warning")
    with serving(*arguments, home=tmp_path / "home", fresh=True) as server:
        load(server.port, plain, N_CLIENTS, 2.0)
        alone, begun = {}, time.perf_counter()
        for job in (*plain, *steered):
            (answer,), _ = load(server.port, [job], 1, 0)
            alone[job] = answer.text
        seconds["one request at a time"] = (time.perf_counter() - begun) / (len(alone) * N_TOKENS)
        rates: dict[str, list[float]] = {"64 clients": [], "64 clients, 8 steerings": []}
        for _ in range(ROUNDS):
            for name, jobs in zip(rates, (plain, steered), strict=True):
                answers, took = load(server.port, jobs, N_CLIENTS, SLICE)
                wrong = [a for a in answers if a.errors or not a.done or a.text != alone[a.job]]
                assert not wrong, wrong[0]
                rates[name].append(took / sum(a.tokens for a in answers))
        seconds |= {name: statistics.median(found) for name, found in rates.items()}
    report.add(
        f"serving mx-tiny, prompts of {n_prompt} tokens, answers of {N_TOKENS}: time of a token",
        seconds,
        "64 clients",
        notes={name: f"{1 / each:.0f} tokens/s" for name, each in seconds.items()},
    )
    assert seconds["one request at a time"] / seconds["64 clients"] >= 4
    pairs = zip(
        *rates.values(), strict=True
    )  # of one round, so that what the machine does otherwise is in both
    assert statistics.median(steered_s / plain_s for plain_s, steered_s in pairs) <= 1.1


def test_prompts_that_begin_alike_cost_what_they_did_when_few_were_kept(report, tmp_path):
    """A hundred prompts behind a common begin, while few such texts are kept and when 2,500 are."""
    numbers = random.Random(0)

    def prompt() -> list[int]:
        return [*range(10, 31), *(numbers.randrange(10, 2500) for _ in range(40))]

    with serving("--log-level", "warning", home=tmp_path / "home", fresh=True) as server:

        def batch() -> float:
            body = {"prompt": [prompt() for _ in range(100)], "max_tokens": 3, "ignore_eos": True}
            begun = time.perf_counter()
            assert call(server, "POST", "/v1/completions", body)[0] == 200
            return time.perf_counter() - begun

        batch()  # the first pass has the model's memory to fetch
        took = [batch() for _ in range(25)]
    seconds = {"few kept": min(took[:5]), "2,500 kept": min(took[-5:])}
    report.add("100 prompts of 61 tokens that begin alike, answers of 3", seconds, "few kept")
    assert seconds["2,500 kept"] <= 1.5 * seconds["few kept"]
