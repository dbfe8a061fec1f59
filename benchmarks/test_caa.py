"""CAA over 256 pairs on a 110 M random Llama: packed batches against a length-sorted padded batch of 32.

pytest benchmarks/test_caa.py --benchmark-only
"""

from __future__ import annotations

import pytest
import torch
from interleaved import medians
from llama import llama_110m
from plain import padded_means

from mechanex.engine.caa import caa_vectors

N_PAIRS = 256


@pytest.fixture(scope="module")
def examples():
    """Token ids: prompts of about 30 tokens, answers of about 8."""
    generator = torch.Generator().manual_seed(1)

    def draw(mean: int, spread: int) -> list[int]:
        n = int(torch.randint(mean - spread, mean + spread + 1, (), generator=generator))
        return torch.randint(3, 16_000, (n,), generator=generator).tolist()

    return [draw(30, 8) for _ in range(N_PAIRS)], *([draw(8, 3) for _ in range(N_PAIRS)] for _ in range(2))


def test_caa_256_pairs(examples, report, benchmark):
    model = llama_110m()
    layers = range(model.config.num_hidden_layers)
    vector = caa_vectors(model, *examples, layers=layers)
    truth = padded_means(model, *examples)
    worst = max(float((vector[n] - truth[n]).norm() / truth[n].norm()) for n in layers)
    assert worst < 1e-4, f"vectors differ by {worst:.1e}"

    ways = {"packed": lambda: caa_vectors(model, *examples, layers=layers)}
    # The shape of the rows, shown on a quarter of the examples.
    few = [side[: N_PAIRS // 4] for side in examples]
    for n in (1, 96, 192, 512):
        ways[f"packed {n}, 64 pairs"] = lambda n=n: caa_vectors(model, *few, layers=layers, row_tokens=n)
    ways["padded, 64 pairs"] = lambda: padded_means(model, *few)
    ways["padded"] = lambda: padded_means(model, *examples)
    found = medians(ways, rounds=2)
    few_found = {name: found.pop(name) for name in list(found) if "64 pairs" in name}
    note = f"largest relative difference of the vectors {worst:.1e}"
    report.add("CAA, 256 pairs, 110 M Llama, all layers", found, "padded", notes={"packed": note})
    report.add("CAA, 64 pairs, by length of the packed rows", few_found, "padded, 64 pairs")
    benchmark.pedantic(ways["packed"], rounds=1)
