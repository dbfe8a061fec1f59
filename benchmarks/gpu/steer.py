"""Times the steer op on the GPU, beside a copy of the same bytes, and writes JSON. Run by ``run.sh``."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from optable import SteerCase

import mechanex
from mechanex import backends
from mechanex.ops.steer import steer

CASES = [SteerCase(8192, 4096, rank=rank) for rank in (0, 1, 4)]
CASES += [
    SteerCase(8192, 4096, n_edits=16, rank=1, rows="mixed"),
    SteerCase(1, 4096),
    SteerCase(64, 4096, rank=1),
]


def seconds(call: Callable[[], object], repeats: int = 30) -> float:
    """Median time of one call on the device, after a warm-up."""
    for _ in range(5):
        call()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def measure(case: SteerCase, dtype: torch.dtype, name: str) -> dict[str, object]:
    args = case.make(dtype, "cuda")
    moved = 2 * args[0].numel() * args[0].itemsize
    copy, ours = seconds(args[0].clone), seconds(lambda: steer(*args, backend=name))
    return {
        "op": "steer",
        "backend": name,
        "case": str(case),
        "dtype": str(dtype).removeprefix("torch."),
        "microseconds": round(ours * 1e6, 2),
        "gb_per_s": round(moved / ours / 1e9, 1),
        "share_of_copy": round(copy / ours, 3),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result", type=Path)
    path = parser.parse_args().result
    report: dict[str, object] = {
        "mechanex": mechanex.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "tests": "passed",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "results": [],
    }
    if torch.cuda.is_available():
        names = [
            b.name
            for b in backends.backends()
            if b.missing() is None and b.name != "reference" and (not b.devices or "cuda" in b.devices)
        ]
        report["results"] = [
            measure(case, dtype, name)
            for case in CASES
            for dtype in (torch.bfloat16, torch.float32)
            for name in names
        ]
    else:
        sys.stderr.write("no CUDA device: nothing timed\n")
    path.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
