"""A server under 64 streaming clients, a minute steered and a minute not, beside one client and one static batch.

pytest benchmarks/test_serving.py
"""

from __future__ import annotations

import statistics
import time

import pytest
import torch
from server_process import serving
from serving_data import NAMES, tone_vectors
from serving_load import Job, load, prompt_of

from mechanex.engine.models.resolve import load as load_model

N_CLIENTS, N_TOKENS = 64, 40
ROUNDS, SLICE = 12, 5.0  # in every round a slice without steering and one with: a minute of each


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
    seconds = {"one static batch": _static(local, prompts)}
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


@torch.no_grad()
def _static(local, prompts):
    """Seconds per token of one left-padded batch through transformers' ``generate``, without a server."""
    ids = [local.tokenizer(prompt)["input_ids"] for prompt in prompts]
    longest = max(map(len, ids))
    batch = torch.tensor([[2] * (longest - len(one)) + one for one in ids])
    mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in ids])
    times = []
    for _ in range(4):
        begun = time.perf_counter()
        local.model.generate(
            batch,
            attention_mask=mask,
            max_new_tokens=N_TOKENS,
            min_new_tokens=N_TOKENS,
            do_sample=False,
            pad_token_id=2,
        )
        times.append((time.perf_counter() - begun) / (len(ids) * N_TOKENS))
    return statistics.median(times[1:])
