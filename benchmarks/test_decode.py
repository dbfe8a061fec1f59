"""Greedy decoding with a KV cache, with a steering vector at no layer, at one and at all.

pytest benchmarks/test_decode.py
"""

from __future__ import annotations

import pytest
import torch
from interleaved import medians
from llama import llama_110m

from mechanex.engine.hooks import Intervention, SteeringPlan
from mechanex.engine.intervention import Edit
from mechanex.engine.models import adapter_for
from mechanex.engine.models.resolve import load

N_TOKENS = 48


def tiny():
    return load("mx-tiny", backend="transformers", device="cpu").model


@pytest.mark.parametrize(
    ("name", "make"), [("mx-tiny", tiny), ("llama 110 M", llama_110m)], ids=lambda x: str(x)
)
def test_decode(report, benchmark, name, make):
    model = make()
    adapter = adapter_for(model)
    ids = torch.randint(3, 500, (1, 16), generator=torch.Generator().manual_seed(0))
    vector = torch.randn(adapter.d_model, generator=torch.Generator().manual_seed(1)) / 10

    def decode(layers):
        with SteeringPlan([Intervention(n, Edit.add(vector)) for n in layers]).apply(model), torch.no_grad():
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=N_TOKENS,
                min_new_tokens=N_TOKENS,
                do_sample=False,
                pad_token_id=0,
            )

    every = range(adapter.n_layers)
    ways = {"none": [], "one": [adapter.n_layers // 2], "all": every}
    found = medians({way: (lambda layers=layers: decode(layers)) for way, layers in ways.items()}, rounds=7)
    rates = {way: f"{N_TOKENS / seconds:.1f} tokens/s" for way, seconds in found.items()}
    report.add(f"decoding {N_TOKENS} tokens, {name}, by layers steered", found, "none", notes=rates)
    benchmark.pedantic(lambda: decode(every), rounds=1)
