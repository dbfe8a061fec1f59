"""Times the ops on the GPU, prints tables and writes JSON. Run by ``run.sh``.

The steer op is timed beside a copy of the same bytes; completion_logprob (in its own file) beside its product alone.

Device times are of CUDA graphs of many calls over inputs that together exceed the caches, the ways taking turns;
launch costs are what the calling thread spends on one call.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

import completion_logprob
from clock import Call, Row, device_seconds, launch_seconds
from optable import ManyArgs, ManyCase, SteerCase

import mechanex
from mechanex import backends
from mechanex.backends import native_cuda
from mechanex.ops.steer import steer

ADD, CLAMP, AFFINE = (SteerCase(8192, 4096, rank=rank) for rank in (0, 1, 4))
# The library's own hooks keep edits in float32, whatever the model's dtype.
WIDE = [SteerCase(8192, 4096, rank=rank, table=torch.float32) for rank in (0, 1, 4)]
MIXED = SteerCase(8192, 4096, n_edits=16, rank=1, rows="mixed")
STEP = ManyCase(SteerCase(16, 4096, n_edits=16, rank=1, rows="mixed"), 2, True, ("none", "step"))
DECODE, DECODE_MIXED = SteerCase(64, 4096, rank=1), SteerCase(64, 4096, n_edits=16, rank=1, rows="mixed")
CASES = [
    *((case, torch.bfloat16) for case in (ADD, CLAMP, AFFINE, *WIDE, MIXED)),
    *((case, torch.float32) for case in (ADD, CLAMP, AFFINE)),
    *((case, torch.bfloat16) for case in (DECODE, DECODE_MIXED)),
]
# Bytes of input that a round of calls walks through: several times any cache.
ROUND_BYTES = 1 << 29
MOST_INPUTS = 64
SHARE_OF_COPY = 0.85
MIXED_RATIO = 1.3
# How many torch additions a Triton launch may cost the calling thread.
LAUNCH_RATIO = 2.0


def on_device(case: SteerCase, dtype: torch.dtype, names: Sequence[str]) -> list[Row]:
    """One case on every backend, beside a copy."""
    first, rows, *tables = case.make(dtype, "cuda")
    n_inputs = min(MOST_INPUTS, max(8, ROUND_BYTES // (first.numel() * first.itemsize)))
    inputs = [first, *(torch.randn_like(first) for _ in range(n_inputs - 1))]
    ways: dict[str, Sequence[Call]] = {"copy": [x.clone for x in inputs]}
    for name in names:
        ways[name] = [partial(steer, x, rows, *tables, backend=name) for x in inputs]
    found = device_seconds(ways)
    moved = 2 * first.numel() * first.itemsize
    return [
        {
            "op": "steer",
            "backend": name,
            "case": str(case),
            "dtype": str(dtype).removeprefix("torch."),
            "microseconds": round(seconds * 1e6, 2),
            "gb_per_s": round(moved / seconds / 1e9, 1),
            "share_of_copy": round(found["copy"] / seconds, 3),
        }
        for name, seconds in found.items()
    ]


def launches(names: Sequence[str]) -> list[Row]:
    """What one call costs the calling thread, beside a torch addition of the same tensors.

    The step is what a decoder makes at every layer: each row its own slots of a table, with strengths and gates.
    """
    x, _, bias, left, right = SteerCase(1, 4096, rank=1).make(torch.bfloat16, "cuda")
    ways: dict[str, Call] = {"torch add": lambda: x + bias, "add, auto": partial(steer, x, None, bias)}
    for name in names:
        ways[f"add, {name}"] = partial(steer, x, None, bias, backend=name)
        ways[f"clamp, {name}"] = partial(steer, x, None, bias, left, right, backend=name)
    args = STEP.make(torch.bfloat16, "cuda")
    ways |= {f"step, {name}": partial(_step, args, name) for name in ("auto", *names)}
    found = launch_seconds(ways)
    return [
        {
            "call": name,
            "microseconds": round(seconds * 1e6, 2),
            "times_torch_add": round(seconds / found["torch add"], 2),
        }
        for name, seconds in found.items()
    ]


def _step(args: ManyArgs, name: str) -> object:
    hidden, rows, strength, bias, left, right, gate = args
    return steer(hidden, rows, bias, left, right, strength=strength, gate=gate, backend=name)


def goals(
    results: Sequence[Row], launch: Sequence[Row], names: Sequence[str]
) -> dict[str, dict[str, object]]:
    """What the project asks of a GPU, per backend, with the number beside the verdict."""
    by_case = {(r["backend"], r["case"], r["dtype"]): r for r in results}
    found: dict[str, dict[str, object]] = {}
    for name in names:
        verdicts: dict[str, object] = {}
        for what, case in (("add", ADD), ("clamp", CLAMP), ("rank 4", AFFINE)):
            share = float(str(by_case[name, str(case), "bfloat16"]["share_of_copy"]))
            verdicts[f"{what}: share of copy"] = [share, share >= SHARE_OF_COPY]
        one, mixed = (
            float(str(by_case[name, str(case), "bfloat16"]["microseconds"]))
            for case in (DECODE, DECODE_MIXED)
        )
        verdicts["16 edits in a decode batch: times one edit"] = [
            round(mixed / one, 2),
            mixed <= MIXED_RATIO * one,
        ]
        found[name] = verdicts
    add = next(float(str(r["times_torch_add"])) for r in launch if r["call"] == "add, auto")
    found["auto"] = {"launch of an add: times torch's": [add, add <= 1.1]}
    for r in launch:
        if r["call"] in ("clamp, triton", "step, triton"):
            times = float(str(r["times_torch_add"]))
            found["triton"][f"launch of a {str(r['call']).split(',')[0]}: times torch's add"] = [
                times,
                times <= LAUNCH_RATIO,
            ]
    return found


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine() -> Row:
    """What the numbers belong to."""
    nvcc = shutil.which("nvcc")
    release = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout if nvcc else ""
    built = native_cuda.missing() is None
    properties = torch.cuda.get_device_properties(0)
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30),
        "mechanex": mechanex.__version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "driver_serves_cuda": native_cuda._module().driver_version() if built else None,
        "native": native_cuda.describe() if built else native_cuda.missing(),
        "triton": version_of("triton"),
        "nvcc": next((line.strip() for line in release.splitlines() if "release" in line), None),
        "python": platform.python_version(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "result", type=Path, help="JSON file, or a folder for one named after device and date"
    )
    parser.add_argument("--tests", default="not run", help="what became of the tests before")
    arguments = parser.parse_args()
    path = arguments.result
    if not torch.cuda.is_available():
        sys.stderr.write("no CUDA device: nothing timed, nothing written\n")
        return 0
    names = [
        b.name
        for b in backends.backends()
        if b.name != "reference" and "steer" in b.ops and b.lacks("cuda") is None
    ]
    about = machine()
    with torch.no_grad():
        results = [row for case, dtype in CASES for row in on_device(case, dtype, names)]
        launch = launches(names)
    scored = completion_logprob.rows()
    report = {
        "machine": about,
        "tests": arguments.tests,
        "goals": goals(results, launch, names) | {"completion_logprob": completion_logprob.goals(scored)},
        "results": results,
        "launch": launch,
        "completion_logprob": scored,
    }
    for r in results:
        sys.stdout.write(
            f"{r['case']!s:<34} {r['dtype']!s:<9} {r['backend']!s:<7} {r['microseconds']:>9} µs "
            f"{r['gb_per_s']:>8} GB/s {r['share_of_copy']:>7} of copy\n"
        )
    for r in launch:
        sys.stdout.write(
            f"launch: {r['call']!s:<16} {r['microseconds']:>7} µs {r['times_torch_add']:>6} of torch's add\n"
        )
    sys.stdout.write(completion_logprob.table(scored))
    sys.stdout.write(json.dumps(report["goals"], indent=2) + f"\ntests: {arguments.tests}\n")
    if path.is_dir():
        device = "-".join(str(about["device"]).lower().split())
        path /= f"{device}-{datetime.date.today().isoformat()}.json"
    path.write_text(json.dumps(report, indent=2) + "\n")
    sys.stdout.write(f"{path}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
