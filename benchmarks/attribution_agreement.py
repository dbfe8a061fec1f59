"""How near attribution by gradients comes to exact patching, and what it costs: the figures of docs/attribution.md.

For pairs of prompts: the Spearman correlation with exact patching over the embedding and all attentions and MLPs, and
over all single heads, with one step and with five. The bundled model reads beginnings of its contrastive data,
SmolLM2-135M (where a home with it is named) sentences; of it also the faithfulness of circuits of a twentieth of the
edges. The cost is told in forward passes of one prompt, of a Llama of 110 M random weights.

    [MECHANEX_REAL_HOME=HOME] python benchmarks/attribution_agreement.py
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from typing import Any, get_args

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from mechanex.bundled import data_path, dataset_names
from mechanex.engine.attribution.circuits import Selection
from mechanex.engine.attribution.edge_scores import attribution_edges
from mechanex.engine.attribution.scores import NodeScores, attribution_scores
from mechanex.engine.models import adapter_for
from mechanex.engine.models.resolve import LoadedModel, load
from mechanex.engine.structure.graph import structure_of
from mechanex.engine.text import encode_prompt

PER_DATASET = 8
CUTS = (8, 12, 5)
"""How many tokens of its continuation a prompt goes on with: the first of these that makes a difference counts."""
LEAST_GAP = 1.0
"""Nats between both runs; with less there is nothing to attribute."""
SENTENCES = [
    ("The capital of France is the city of", "The capital of Italy is the city of"),
    ("The opposite of hot is", "The opposite of big is"),
    ("Two plus three equals", "Two plus two equals"),
    ("Yesterday she", "Tomorrow she"),
    ("In German, the word for dog is", "In Spanish, the word for dog is"),
    ("The dogs in the garden", "The dog in the garden"),
    (
        "When Mary and John went to the store, John gave a drink to",
        "When Mary and John went to the store, Mary gave a drink to",
    ),
]
Pair = tuple[list[int], list[int]]


def spearman(one: Tensor, other: Tensor) -> float:
    """Rank correlation of [n] and [n]."""
    ranks = [side.argsort().argsort().double() for side in (one, other)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def modules_of(found: NodeScores) -> Tensor:
    """[n_modules] scores."""
    return torch.tensor(list(found.scores.values()))


def heads_of(found: NodeScores) -> Tensor:
    """[n_layers * n_heads] scores."""
    return torch.cat(list(found.heads.values()))


def contrastive(tokenizer: Any, dataset: str) -> Iterator[list[Pair]]:
    """For each line of a dataset its two texts' beginnings, cut to each length, where they can be compared."""
    for line in map(json.loads, data_path(dataset).read_text(encoding="utf-8").splitlines()):
        if "positive" in line:
            n = len(encode_prompt(tokenizer, line["prompt"]))
            one, other = (
                encode_prompt(tokenizer, line["prompt"] + line[side]) for side in ("positive", "negative")
            )
            cuts = [(one[: n + cut], other[: n + cut]) for cut in CUTS]
            yield [(a, b) for a, b in cuts if a != b and len(a) == len(b)]


def compared(loaded: LoadedModel, pair: Pair) -> list[float] | None:
    """Correlations over modules and heads with one step, then with five; None where the runs hardly differ."""
    exact = attribution_scores(
        loaded.model, *pair, tokenizer=loaded.tokenizer, method="exact", positions=False
    )
    if abs(exact.runs.clean_metric - exact.runs.corrupted_metric) < LEAST_GAP:
        return None
    found = [
        attribution_scores(loaded.model, *pair, tokenizer=loaded.tokenizer, steps=steps) for steps in (1, 5)
    ]
    return [spearman(part(one), part(exact)) for one in found for part in (modules_of, heads_of)]


def first_compared(loaded: LoadedModel, pairs: Iterable[Pair]) -> list[float] | None:
    """Of the first pair whose runs differ."""
    return next((found for pair in pairs if (found := compared(loaded, pair)) is not None), None)


def show(name: str, rows: list[list[float]]) -> None:
    """Prints medians and the worst."""
    print(f"{name}, {len(rows)} pairs")
    names = ("modules, 1 step", "heads, 1 step", "modules, 5 steps", "heads, 5 steps")
    for title, values in zip(names, zip(*rows, strict=True), strict=True):
        print(f"  {title:18s} median {statistics.median(values):5.2f}  worst {min(values):5.2f}")


def agreement_of_mx_tiny() -> None:
    """The bundled model on its data."""
    loaded = load("mx-tiny", backend="transformers", device="cpu")
    rows: list[list[float]] = []
    for dataset in dataset_names():
        found = (first_compared(loaded, pairs) for pairs in contrastive(loaded.tokenizer, dataset))
        rows += islice((one for one in found if one is not None), PER_DATASET)
    show("mx-tiny", rows)


def agreement_of_smollm2(home: str) -> None:
    """SmolLM2 on those of the sentences that have as many tokens."""
    loaded = load(f"{home}/models/smollm2-135m", backend="transformers", device="cpu", dtype="float32")
    pairs = [tuple(encode_prompt(loaded.tokenizer, text) for text in pair) for pair in SENTENCES]
    found = [compared(loaded, (a, b)) for a, b in pairs if len(a) == len(b)]
    show("SmolLM2-135M", [one for one in found if one is not None])
    print("SmolLM2-135M, faithfulness of circuits of 5 % of the edges, 5 steps")
    for a, b in pairs:
        if len(a) == len(b):
            edges = attribution_edges(loaded.model, a, b, tokenizer=loaded.tokenizer, steps=5)
            gap = edges.runs.clean_metric - edges.runs.corrupted_metric
            kept = [edges.circuit(share=0.05, how=how).faithfulness for how in get_args(Selection)]
            ways = ", ".join(f"{how} {one:.2f}" for how, one in zip(get_args(Selection), kept, strict=True))
            print(f"  {loaded.tokenizer.decode(a)!r} ({gap:.1f} nats): {ways}")


def seconds(run: Callable[[], Any]) -> float:
    """Median of three."""
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def cost() -> None:
    """Prints what scores cost, in forward passes over one prompt of 64 tokens."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32000,
            hidden_size=768,
            intermediate_size=2048,
            num_hidden_layers=12,
            num_attention_heads=12,
            num_key_value_heads=4,
            max_position_embeddings=512,
        )
    ).eval()
    clean = torch.randint(5, 30000, (64,)).tolist()
    corrupted = [77 if at in (10, 20) else token for at, token in enumerate(clean)]
    ids = torch.tensor([clean])

    def forward() -> None:
        with torch.no_grad():
            model(ids, use_cache=False)

    forward()
    one = seconds(forward)
    begin = time.perf_counter()
    structure_of(adapter_for(model))
    print(f"Llama of 110 M, 64 tokens, in forward passes of {one:.3f} s")
    print(f"  structure, once    {(time.perf_counter() - begin) / one:6.1f}")
    for name, scores in (("modules", attribution_scores), ("edges", attribution_edges)):
        for steps in (1, 5):
            run = partial(scores, model, clean, corrupted, steps=steps)
            run()
            print(f"  {name + ', ' + str(steps) + ' steps':18s} {seconds(run) / one:6.1f}")


if __name__ == "__main__":
    agreement_of_mx_tiny()
    if "MECHANEX_REAL_HOME" in os.environ:
        agreement_of_smollm2(os.environ["MECHANEX_REAL_HOME"])
    cost()
