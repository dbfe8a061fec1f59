"""Tokens a second in vLLM: plain, one vector for all requests, and a vector and a strength of its own for each of 64.

    build/vllm/venv/bin/python benchmarks/in_vllm.py [MODEL …] [--rounds 5] [--new 32] [--compile] [--no-stock]

Without MODEL: the random Llama of 110 M parameters. Kinds of batches take turns in one engine, so that each ratio is of
neighbours in time; a stock vLLM without this plugin comes after them, in an engine of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

N, N_PROMPT = 64, 16
# MECHANEX_BENCH_CPU_TIME=1: what the process computes, for machines that others use too; the engine must run in it.
CPU_TIME = os.environ.get("MECHANEX_BENCH_CPU_TIME") == "1"
CLOCK = time.process_time if CPU_TIME else time.perf_counter
OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 256,
    "max_num_seqs": N,
    "block_size": 32,
    "enable_prefix_caching": False,
    "skip_tokenizer_init": True,
}


def llama_110m(folder: Path) -> Path:
    """A Llama of 12 layers, 768 wide, with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16_000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=12,
        max_position_embeddings=1024,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def seconds(generate: Any, prompts: list[dict[str, Any]], n_new: int, **options: Any) -> float:
    """What one batch takes."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=n_new, ignore_eos=True, detokenize=False)
    begin = CLOCK()
    generate(prompts, params, use_tqdm=False, **options)
    return CLOCK() - begin


def measure(
    model: str | Path, rounds: int, n_new: int, with_stock: bool, options: dict[str, Any]
) -> dict[str, Any]:
    """Medians over rounds of one model."""
    from vllm import LLM as Stock

    from mechanex.vllm import LLM, SteerBy

    llm = LLM(model, **options)
    config = llm.engine.llm_engine.vllm_config.model_config
    width, n_layers = config.get_hidden_size(), config.get_total_num_hidden_layers()
    generator = torch.Generator().manual_seed(0)
    prompts = [
        {"prompt_token_ids": torch.randint(3, 1000, (N_PROMPT,), generator=generator).tolist()}
        for _ in range(N)
    ]
    for i in range(N):
        vector = torch.randn(width, generator=generator)
        llm.register({n_layers // 2: vector / vector.norm()}, f"v{i}")
    asked = {
        "plain": None,
        "one vector": SteerBy("v0", 2.0),
        "64 vectors": [SteerBy(f"v{i}", 0.5 + i / N) for i in range(N)],
    }
    taken: dict[str, list[float]] = {name: [] for name in asked}
    for steering in asked.values():  # warm
        seconds(llm.generate, prompts, n_new, steering=steering)
    for i in range(rounds):
        for name in list(asked)[:: 1 if i % 2 else -1]:
            taken[name].append(seconds(llm.generate, prompts, n_new, steering=asked[name]))
    llm.engine.llm_engine.engine_core.shutdown()
    del llm
    if with_stock:
        stock = Stock(model=str(model), **options)
        seconds(stock.generate, prompts, n_new)
        taken["stock vLLM"] = [seconds(stock.generate, prompts, n_new) for _ in range(rounds)]
        stock.llm_engine.engine_core.shutdown()
    found: dict[str, Any] = {"model": str(model), "batch": N, "new tokens": n_new, "rounds": rounds}
    for name, times in taken.items():
        found[name] = {"tokens a second": round(N * n_new / statistics.median(times), 1)}
        if name in asked:
            ratios = [plain / one for plain, one in zip(taken["plain"], times, strict=True)]
            found[name]["of plain"] = round(statistics.median(ratios), 3)
    return found


def main() -> None:
    """Prints a line for each model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new", type=int, default=32, help="tokens that each request is given")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--no-stock", action="store_true")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    for name, value in {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CONFIGURE_LOGGING": "0",
        "HF_HUB_OFFLINE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0" if CPU_TIME else "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }.items():
        os.environ.setdefault(name, value)
    options = OPTIONS | {"enforce_eager": not given.compile}
    with tempfile.TemporaryDirectory() as folder:
        models = given.models or [str(llama_110m(Path(folder) / "llama-110m"))]
        found = [measure(model, given.rounds, given.new, not given.no_stock, options) for model in models]
    for one in found:
        print(json.dumps(one))
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
