"""What chunks cost an answer, beside context-cite 0.0.4 (arXiv:2409.00729) on SmolLM2-135M-Instruct.

context-cite answers 64 ablations of the documents, half of the chunks left out of each at random, and fits a linear
model to them. Here each chunk is blocked once. Both get the same chat prompt, the same chunks and the same answer, the
model's own, and the same measure: the drop of the answer's log-probability, in nats, when the three chunks that each
ranks first are taken out of the prompt.

It takes an environment of its own with both packages:

    python -m venv build/context-cite
    build/context-cite/bin/pip install . scikit-learn pandas datasets nltk spacy
    build/context-cite/bin/pip install --no-deps context-cite==0.0.4
    MECHANEX_REAL_HOME=HOME build/context-cite/bin/python benchmarks/context_cite.py [--readings 5] [--chunks 16]
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
import warnings
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from facts import copied_facts

from mechanex.engine.models import adapter_for
from mechanex.engine.models.resolve import load
from mechanex.engine.raag.knockouts import AnsweredPrompt, Knockouts
from mechanex.engine.score_pairs import score_pairs

TOP = 3


def theirs() -> tuple[Any, Any]:
    """context-cite's ContextCiter, and a partition by our chunks."""
    # This script has the package's name.
    here = Path(__file__).parent.resolve()
    sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != here]
    import nltk

    nltk.download = lambda *_, **__: False  # fetched at import for a partition that isn't used
    from context_cite import ContextCiter
    from context_cite.context_partitioner import BaseContextPartitioner

    class Chunks(BaseContextPartitioner):  # type: ignore[misc]
        def __init__(self, chunks: list[str]) -> None:
            super().__init__(" ".join(chunks))
            self.chunks = chunks

        @property
        def num_sources(self) -> int:
            return len(self.chunks)

        def split_context(self) -> None:
            return None

        def get_source(self, index: int) -> str:
            return self.chunks[index]

        def get_context(self, mask: Any = None) -> str:
            return " ".join(c for i, c in enumerate(self.chunks) if mask is None or mask[i])

    return ContextCiter, Chunks


def asked_over(seed: int, n: int) -> tuple[str, list[str]]:
    """A question, and chunks of two facts each, one of which answers it."""
    first = copied_facts(1000 * seed)
    # Of each subject one fact alone, so that none contradicts another.
    facts = {one.rsplit(" ", 1)[0]: one for one in first.sentences}
    part = 0
    while len(facts) < 2 * n:
        part += 1
        for one in copied_facts(1000 * seed + part).sentences:
            facts.setdefault(one.rsplit(" ", 1)[0], one)
    mixed = random.Random(seed).sample(list(facts.values())[: 2 * n], 2 * n)
    return first.question, [" ".join(mixed[i : i + 2]) for i in range(0, 2 * n, 2)]


def reading_of(citer: Any, tokenizer: Any, chunks: list[str]) -> tuple[AnsweredPrompt, list[tuple[int, int]]]:
    """The citer's prompt and answer as ours, and the tokens of each chunk."""
    ids, text = citer._get_prompt_ids(return_prompt=True)
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    spans, place = [], text.index(chunks[0])
    for chunk in chunks:
        start = text.index(chunk, place)
        place = start + len(chunk)
        mine = [i for i, (a, b) in enumerate(offsets) if a < place and b > start]
        spans.append((mine[0], mine[-1] + 1))
    end = spans[-1][1]
    return AnsweredPrompt(tuple(ids[:end]), tuple(ids[end:]), tuple(citer._response_ids)), spans


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--readings", type=int, default=5)
    parser.add_argument("--chunks", type=int, default=16)
    parser.add_argument("--ablations", type=int, default=64)
    asked = parser.parse_args()
    citer_class, chunks_class = theirs()
    warnings.filterwarnings("ignore")
    home = os.environ["MECHANEX_REAL_HOME"]
    loaded = load(f"{home}/models/smollm2-135m", backend="transformers", device="cpu", dtype="float32")
    model, tokenizer, adapter = loaded.model, loaded.tokenizer, adapter_for(loaded.model)
    rows: list[list[float]] = []
    for seed in range(asked.readings):
        question, chunks = asked_over(seed, asked.chunks)
        partition = chunks_class(chunks)
        citer = citer_class(
            model,
            tokenizer,
            partition.context,
            question,
            partitioner=partition,
            num_ablations=asked.ablations,
            generate_kwargs={"max_new_tokens": 24, "do_sample": False},
        )
        reading, spans = reading_of(citer, tokenizer, chunks)
        Knockouts(adapter, reading)  # what the model can do is found out once

        def ours() -> torch.Tensor:
            found = Knockouts(adapter, reading).blocked([(0, 0), *spans])  # noqa: B023
            return (found[0] - found[1:]).sum(1)

        def alone(left_out: set[int]) -> float:
            kept = [i not in left_out for i in range(len(chunks))]  # noqa: B023
            ids = citer._get_prompt_ids(mask=kept)  # noqa: B023
            return float(score_pairs(adapter, [(ids, reading.answer)]).sums[0])  # noqa: B023

        begin = time.process_time()
        weights = torch.tensor(citer.get_attributions(verbose=False))
        middle = time.process_time()
        drops = ours()
        end = time.process_time()
        whole = alone(set())
        best = [whole - alone(set(scores.topk(TOP).indices.tolist())) for scores in (weights, drops)]
        rows.append([middle - begin, end - middle, *best])
        print(
            f"{len(chunks)} chunks, {len(reading.prompt)} + {len(reading.answer)} tokens: context-cite "
            f"{rows[-1][0]:.1f} s, drop {best[0]:.2f}; blocked {rows[-1][1]:.1f} s, drop {best[1]:.2f}",
            flush=True,
        )
    time_theirs, time_ours, drop_theirs, drop_ours = (mean(column) for column in zip(*rows, strict=True))
    print(
        f"context-cite, {asked.ablations} ablations   {time_theirs:7.1f} s   top-{TOP} drop {drop_theirs:6.2f} nats"
    )
    print(f"each chunk blocked once      {time_ours:7.1f} s   top-{TOP} drop {drop_ours:6.2f} nats")
    print(f"{time_theirs / time_ours:.1f} times as fast")


if __name__ == "__main__":
    main()
