"""What a second process brings to extraction, scoring and an optimization step, with one thread in each.

    python benchmarks/ranks.py [--rounds 3] [--processes 2] [--split]

Random Llama of 110 M; both ways alternate, and the median of their ratio is shown. With --split the model is split over
the processes instead, and what each holds is shown against what it holds by arithmetic.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from llama import llama_110m
from torch import nn

import mechanex.distributed
from mechanex.engine.caa import caa_vectors
from mechanex.engine.models import adapter_for
from mechanex.engine.models.resolve import load
from mechanex.engine.score import completion_logprobs
from mechanex.engine.sharded import of_this_process
from mechanex.utils.optimization import TrainingDatapoint, optimize_vector

N_PAIRS, N_POINTS, STEPS = 96, 32, 6
HELD = "MiB of weights"


def seconds(run: Callable[[], Any]) -> float:
    """Of the second call: the first finds out what the model can do."""
    run()
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def mebibytes(model: nn.Module) -> float:
    """Of the weights that this process holds."""
    return (
        sum(part.numel() * part.element_size() for part in map(of_this_process, model.parameters())) / 2**20
    )


def by_arithmetic(config: Any, processes: int) -> float:
    """Mebibytes of float32 weights in each process: all but the norms is split."""
    norms = (2 * config.num_hidden_layers + 1) * config.hidden_size
    matrices = 2 * config.vocab_size * config.hidden_size
    matrices += config.num_hidden_layers * config.hidden_size * 4 * config.hidden_size
    matrices += config.num_hidden_layers * config.hidden_size * 3 * config.intermediate_size
    return 4 * (matrices / processes + norms) / 2**20


def opened(folder: str | None) -> nn.Module:
    """The model; split over the processes where it is in a folder."""
    if folder is None:
        return llama_110m()
    return load(folder, backend="transformers", tp="auto", tokenizer=object()).model


def measured(folder: str | None) -> dict[str, float]:
    """Seconds of each kind of work in this process, which others may share, and what it holds."""
    torch.set_num_threads(1)
    whole = opened(folder)
    model = adapter_for(whole)
    draw = torch.Generator().manual_seed(0)

    def ids(n: int) -> list[int]:
        return torch.randint(5, 15_900, (n,), generator=draw).tolist()

    prompts: list[Any] = [ids(24) for _ in range(N_PAIRS)]
    sides: list[Any] = [[ids(12) for _ in range(N_PAIRS)] for _ in range(2)]
    points = [TrainingDatapoint(prompts[i], dst_completions=[sides[0][i]]) for i in range(N_POINTS)]

    def optimize() -> None:
        optimize_vector(model, points, 4, max_iters=STEPS, seed=0)

    return {
        HELD: mebibytes(whole),
        "extraction (CAA, 96 pairs)": seconds(lambda: caa_vectors(model, prompts, *sides, [4, 8])),
        "scoring (96 completions)": seconds(lambda: completion_logprobs(model, prompts, sides[0])),
        f"optimization ({N_POINTS} datapoints, {STEPS} steps)": seconds(optimize),
    }


def run(processes: int, split: str | None) -> dict[str, float]:
    """The first process's seconds in a job of so many, of a model in a folder that it splits, or of one whole."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(processes),
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        more = [] if split is None else ["--folder", split]
        subprocess.run([*command, __file__, "--out", str(out), *more], check=True, env=environment)
        found: dict[str, float] = json.loads(out.read_text())
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--split", action="store_true", help="split the model (tensor parallelism)")
    parser.add_argument("--out", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.out is not None:
        found = measured(options.folder)
        if mechanex.distributed.is_first():
            Path(options.out).write_text(json.dumps(found))
        return
    with tempfile.TemporaryDirectory() as folder:
        if options.split:
            llama_110m().save_pretrained(folder)
        split = folder if options.split else None
        rounds = [(run(1, None), run(options.processes, split)) for _ in range(options.rounds)]
    one, many = (found.pop(HELD) for found in rounds[0])
    told = (
        f", {by_arithmetic(llama_110m().config, options.processes):.1f} by arithmetic"
        if options.split
        else ""
    )
    print(f"weights {one:.1f} MiB alone, {many:.1f} in each of {options.processes}{told}")
    for name in rounds[0][0]:
        ratios = [one[name] / many[name] for one, many in rounds]
        alone = statistics.median(one[name] for one, _ in rounds)
        print(
            f"{name:45s} {alone:7.2f} s alone, {statistics.median(ratios):.2f} times as fast by {options.processes}"
        )


if __name__ == "__main__":
    main()
