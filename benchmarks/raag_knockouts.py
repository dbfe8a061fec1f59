"""Leave-one-out of chunks of 40 tokens: blocked and removed, in prefills and against one whole pass per knock-out.

python benchmarks/raag_knockouts.py [--chunks 64] [--every 1] [--layers 8] [--width 384]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mechanex.engine.models import adapter_for
from mechanex.engine.raag.knockouts import AnsweredPrompt, Knockouts, without_chunk


def seconds(run: Callable[[], Any]) -> tuple[float, Any]:
    """Of the process, which other work on the machine doesn't count for, and what ``run`` gave."""
    begin = time.process_time()
    found = run()
    return time.process_time() - begin, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chunks", type=int, default=64)
    parser.add_argument("--every", type=int, default=1, help="remove only every n-th chunk, to save time")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=384)
    asked = parser.parse_args()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=2000,
            hidden_size=asked.width,
            intermediate_size=asked.width * 3,
            num_hidden_layers=asked.layers,
            num_attention_heads=asked.width // 64,
            num_key_value_heads=asked.width // 128,
            max_position_embeddings=8192,
        )
    ).eval()
    adapter = adapter_for(model)
    n = 40 * asked.chunks
    ids = torch.randint(10, 1900, (1 + n + 32,)).tolist()
    reading = AnsweredPrompt(tuple(ids[: 1 + n]), tuple(ids[1 + n : 17 + n]), tuple(ids[17 + n :]))
    spans = [(1 + 40 * i, 41 + 40 * i) for i in range(asked.chunks)]
    Knockouts(adapter, reading)  # What the model can do is found out once.
    prefill = min(seconds(lambda: without_chunk(adapter, reading, [(0, 0)]))[0] for _ in range(3))
    blocked, _ = seconds(lambda: Knockouts(adapter, reading).blocked(spans))
    some = spans[asked.every // 2 :: asked.every]
    knockouts = Knockouts(adapter, reading)
    knockouts.removed(spans[-1:])  # The documents are read once for all that are removed.
    removed, found = seconds(lambda: knockouts.removed(some))
    removed += seconds(lambda: Knockouts(adapter, reading).removed(spans[-1:]))[0] * len(some) / len(spans)
    alone, truth = seconds(lambda: torch.cat([without_chunk(adapter, reading, [span]) for span in some]))
    print(f"prefill of {reading.size} tokens      {prefill:8.3f} s")
    print(f"{asked.chunks} blocked                   {blocked:8.3f} s  {blocked / prefill:.2f} prefills")
    print(f"{len(some)} removed                   {removed:8.3f} s  {removed / prefill:.2f} prefills")
    print(f"{len(some)} removed, a pass for each  {alone:8.3f} s  {alone / removed:.2f} times as long")
    print(f"largest difference           {float((found - truth).abs().max()):.1e}")


if __name__ == "__main__":
    main()
