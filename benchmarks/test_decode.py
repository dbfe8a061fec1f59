"""Greedy decoding: ours against transformers' own generate, and with a steering vector at no layer, at one and at all.

pytest benchmarks/test_decode.py
"""

from __future__ import annotations

import os

import pytest
import torch
from interleaved import medians
from llama import llama_110m

from mechanex.engine.decode.request import Steer, TextRequest
from mechanex.engine.decode.row import Row
from mechanex.engine.decode.run import decode
from mechanex.engine.hooks import Intervention, SteeringPlan
from mechanex.engine.intervention import Edit
from mechanex.engine.models import adapter_for
from mechanex.engine.models.resolve import load

N_TOKENS = 48


def tiny():
    return load("mx-tiny", backend="transformers", device="cpu").model


def smollm2():
    folder = os.environ.get("MECHANEX_REAL_HOME")
    if folder is None:
        pytest.skip("make it with scripts/real_model.py --home HOME, and set MECHANEX_REAL_HOME=HOME")
    return load(f"{folder}/models/smollm2-135m", backend="transformers", device="cpu", dtype="float32").model


MODELS = [("mx-tiny", tiny), ("llama 110 M", llama_110m), ("SmolLM2", smollm2)]


def transformers_generate(model, ids):
    with torch.no_grad():
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=N_TOKENS,
            min_new_tokens=N_TOKENS,
            do_sample=False,
            pad_token_id=0,
        )


class Silent:
    """A tokenizer for models without one: what tokens are written as is not measured here."""

    def decode(self, *_, **__):
        return ""


@pytest.mark.parametrize("n_rows", [1, 16])
@pytest.mark.parametrize(("name", "make"), MODELS, ids=lambda x: str(x))
def test_the_decoder_against_transformers(report, benchmark, name, make, n_rows):
    model = make()
    adapter = adapter_for(model)
    ids = torch.randint(3, 500, (n_rows, 16), generator=torch.Generator().manual_seed(0))
    edits = [Edit.clamp(torch.randn(adapter.d_model), 1.0) for _ in range(8)]

    def ours(steered):
        rows = []
        for i, prompt in enumerate(ids.tolist()):
            layers = range(adapter.n_layers) if steered else ()
            steering = tuple(Steer(layer, edits[i % 8]) for layer in layers)
            rows.append(
                Row(TextRequest(prompt, N_TOKENS, steering=steering), Silent(), (), prompt=(i, n_rows))
            )
        decode(adapter, rows, 0)

    ways = {
        "transformers": lambda: transformers_generate(model, ids),
        "ours": lambda: ours(False),
        "ours, every layer clamped, 8 ways": lambda: ours(True),
    }
    found = medians(ways, rounds=7)
    rates = {way: f"{N_TOKENS / seconds:.1f} steps/s" for way, seconds in found.items()}
    report.add(f"decoding {N_TOKENS} tokens of {n_rows} rows, {name}", found, "transformers", notes=rates)
    benchmark.pedantic(lambda: ours(True), rounds=1)


@pytest.mark.parametrize(("name", "make"), MODELS, ids=lambda x: str(x))
def test_decode(report, benchmark, name, make):
    model = make()
    adapter = adapter_for(model)
    ids = torch.randint(3, 500, (1, 16), generator=torch.Generator().manual_seed(0))
    vector = torch.randn(adapter.d_model, generator=torch.Generator().manual_seed(1)) / 10

    def decode(layers):
        with SteeringPlan([Intervention(n, Edit.add(vector)) for n in layers]).apply(model):
            transformers_generate(model, ids)

    every = range(adapter.n_layers)
    ways = {"none": [], "one": [adapter.n_layers // 2], "all": every}
    found = medians({way: (lambda layers=layers: decode(layers)) for way, layers in ways.items()}, rounds=7)
    rates = {way: f"{N_TOKENS / seconds:.1f} tokens/s" for way, seconds in found.items()}
    report.add(f"decoding {N_TOKENS} tokens, {name}, by layers steered", found, "none", notes=rates)
    benchmark.pedantic(lambda: decode(every), rounds=1)
