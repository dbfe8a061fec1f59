"""What a second process brings to extraction, scoring and an optimization step, with one thread in each.

    python benchmarks/ranks.py [--rounds 3] [--processes 2]

Random Llama of 110 M; both ways alternate, and the median of their ratio is shown.
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

import mechanex.distributed
from mechanex.engine.caa import caa_vectors
from mechanex.engine.models import adapter_for
from mechanex.engine.score import completion_logprobs
from mechanex.utils.optimization import TrainingDatapoint, optimize_vector

N_PAIRS, N_POINTS, STEPS = 96, 32, 6


def seconds(run: Callable[[], Any]) -> float:
    """Of the second call: the first finds out what the model can do."""
    run()
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def measured() -> dict[str, float]:
    """Seconds of each kind of work in this process, which others may share."""
    torch.set_num_threads(1)
    model = adapter_for(llama_110m())
    draw = torch.Generator().manual_seed(0)

    def ids(n: int) -> list[int]:
        return torch.randint(5, 15_900, (n,), generator=draw).tolist()

    prompts: list[Any] = [ids(24) for _ in range(N_PAIRS)]
    sides: list[Any] = [[ids(12) for _ in range(N_PAIRS)] for _ in range(2)]
    points = [TrainingDatapoint(prompts[i], dst_completions=[sides[0][i]]) for i in range(N_POINTS)]

    def optimize() -> None:
        optimize_vector(model, points, 4, max_iters=STEPS, seed=0)

    return {
        "extraction (CAA, 96 pairs)": seconds(lambda: caa_vectors(model, prompts, *sides, [4, 8])),
        "scoring (96 completions)": seconds(lambda: completion_logprobs(model, prompts, sides[0])),
        f"optimization ({N_POINTS} datapoints, {STEPS} steps)": seconds(optimize),
    }


def run(processes: int) -> dict[str, float]:
    """The first process's seconds in a job of so many."""
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
        subprocess.run([*command, __file__, "--out", str(out)], check=True, env=environment)
        found: dict[str, float] = json.loads(out.read_text())
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.out is not None:
        found = measured()
        if mechanex.distributed.is_first():
            Path(options.out).write_text(json.dumps(found))
        return
    rounds = [(run(1), run(options.processes)) for _ in range(options.rounds)]
    for name in rounds[0][0]:
        ratios = [one[name] / many[name] for one, many in rounds]
        alone = statistics.median(one[name] for one, _ in rounds)
        print(
            f"{name:45s} {alone:7.2f} s alone, {statistics.median(ratios):.2f} times as fast by {options.processes}"
        )


if __name__ == "__main__":
    main()
