"""Times the steer op on the GPU: its share of a copy of the same bytes, launches, choice by size. Run by ``run.sh``.

Device times are of CUDA graphs of many calls over inputs that together exceed the caches, the ways taking turns; launch
costs are what the calling thread spends on one call.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from clock import Call, call_seconds, device_seconds, launch_seconds
from optable import ManyArgs, ManyCase, SteerCase
from record import Record, arguments, has_device

from mechanex import backends
from mechanex.backends import triton
from mechanex.ops.steer import steer

WIDE = torch.float32
# What is timed against a copy: name, rows, edits, rank, dtype of rows and edits, least share on the backend of `auto`.
# The library's own hooks keep edits in float32, whatever the model's dtype.
SHARES = (
    ("add, bfloat16 edits, by row", 2, 0, torch.bfloat16, None, None),
    ("add", 1, 0, torch.bfloat16, WIDE, 0.93),
    ("clamp, bfloat16 edits", 1, 1, torch.bfloat16, None, None),
    ("clamp", 1, 1, torch.bfloat16, WIDE, 0.93),
    ("rank 4, bfloat16 edits", 1, 4, torch.bfloat16, None, None),
    ("rank 4", 1, 4, torch.bfloat16, WIDE, 0.90),
    ("16 edits, bfloat16", 16, 1, torch.bfloat16, None, None),
    ("16 edits", 16, 1, torch.bfloat16, WIDE, 0.88),
    ("add", 1, 0, torch.float32, None, 0.93),
    ("clamp", 1, 1, torch.float32, None, 0.93),
    ("rank 4", 1, 4, torch.float32, None, 0.90),
)
# Rows of the table of `auto`; the kinds are those that a model's hooks make.
SIZES = (1, 16, 64, 256, 1024, 4096)
KINDS = (
    ("add", 1, 0, "none", False),
    ("clamp", 1, 1, "none", False),
    ("rank 4", 1, 4, "none", False),
    ("8 clamps by row", 8, 1, "mixed", False),
    ("8 clamps by row with strengths", 8, 1, "mixed", True),
)
NEAR_FASTEST = 1.1
# Bytes of input that a round of calls walks through: several times any cache.
ROUND_BYTES = 1 << 29
MOST_INPUTS = 64


class Bench:
    """The cases on one device.

    Args:
        options: as parsed.
        record: where rows go.
    """

    def __init__(self, options: argparse.Namespace, record: Record) -> None:
        self.record, self.device = record, options.device
        self.rows, self.width = (64, 256) if options.tiny else (8192, 4096)
        self.rounds = 3 if options.tiny else 25
        self.names = [
            b.name
            for b in backends.backends()
            if b.name not in ("reference", "eager") and "steer" in b.ops and b.lacks(self.device) is None
        ]

    def shares(self) -> None:
        """Large calls, beside a copy."""
        for what, n_edits, rank, dtype, table, least in SHARES:
            rows = "none" if n_edits == 1 else "mixed"
            case = SteerCase(self.rows, self.width, n_edits=n_edits, rank=rank, rows=rows, table=table)
            first, index, *tables = case.make(dtype, self.device)
            n_inputs = min(MOST_INPUTS, max(8, ROUND_BYTES // (first.numel() * first.itemsize)))
            inputs = [first, *(torch.randn_like(first) for _ in range(n_inputs - 1))]
            ways: dict[str, Sequence[Call]] = {"copy": [x.clone for x in inputs]}
            for name in (*self.names, "auto"):
                ways[name] = [partial(steer, x, index, *tables, backend=name) for x in inputs]
            found = device_seconds(ways, self.rounds)
            shares = {name: found["copy"] / seconds for name, seconds in found.items()}
            rate = 2 * first.numel() * first.itemsize / found["copy"] / 1e12
            note = ", ".join(f"{name} {shares[name]:.3f}" for name in self.names)
            named = f"steer {str(dtype).removeprefix('torch.')} {case.n_rows}x{case.width}, {what}"
            self.record.add(
                f"{named}: share of copy, auto",
                shares["auto"],
                least=least,
                note=f"{note}; copy {rate:.2f} TB/s",
                microseconds={name: round(seconds * 1e6, 2) for name, seconds in found.items()},
            )
            if rank and "clusters" in shares:
                self.record.add(f"{named}: share of copy, clusters", shares["clusters"], least=least)

    def launches(self) -> None:
        """What one call costs the calling thread, beside a torch addition of the same tensors.

        The step is what a decoder makes at every layer: each row its own slots of a table, with strengths and gates.
        """
        x, _, bias, left, right = SteerCase(1, self.width, rank=1).make(torch.bfloat16, self.device)
        step = ManyCase(
            SteerCase(16, self.width, n_edits=16, rank=1, rows="mixed"), 2, True, ("none", "step")
        ).make(torch.bfloat16, self.device)
        by_row = SteerCase(16, self.width, n_edits=8, rank=1, rows="mixed", table=WIDE).make(
            torch.bfloat16, self.device
        )
        ways: dict[str, Call] = {"torch add": lambda: x + bias, "add, auto": partial(steer, x, None, bias)}
        for name in (*self.names, "auto"):
            if name != "auto":
                ways[f"add, {name}"] = partial(steer, x, None, bias, backend=name)
            ways[f"clamp, {name}"] = partial(steer, x, None, bias, left, right, backend=name)
            ways[f"8 clamps by row, {name}"] = partial(steer, *by_row, backend=name)
            ways[f"step, {name}"] = partial(_step, step, name)
        found = launch_seconds(ways, *((3, 5) if self.rounds == 3 else ()))
        for what, seconds in found.items():
            most = None
            if what == "add, auto":
                most = 1.1 * found["torch add"] * 1e6
            elif what.endswith(", native") and not what.startswith("step"):
                most = 10
            elif what.endswith(", triton") and not what.startswith("step"):
                most = min(15.0, 2 * found["torch add"] * 1e6)
            note = f"{seconds / found['torch add']:.2f} torch adds"
            if what.endswith(", triton"):
                note += f", {_how_launched()}"
            self.record.add(f"launch: {what}", seconds * 1e6, "µs", most=most, note=note)

    def table(self) -> None:
        """What `auto` takes by size: calls one after another, and the same on the device alone, as in a graph."""
        sizes = (1, 16) if self.rounds == 3 else SIZES
        for what, n_edits, rank, rows, with_strengths in KINDS:
            for n in sizes:
                args = SteerCase(n, self.width, n_edits=n_edits, rank=rank, rows=rows, table=WIDE).make(
                    torch.bfloat16, self.device
                )
                strength = torch.rand(n, device=self.device) if with_strengths else None
                calls: dict[str, Call] = {
                    name: partial(steer, *args, strength=strength, backend=name)
                    for name in (*self.names, "auto")
                }
                found = call_seconds(calls, 9, 50 if n <= 256 else 10)
                on_device = device_seconds({name: [call] * 20 for name, call in calls.items()}, 7)
                fastest = min(found[name] for name in self.names)
                note = ", ".join(
                    f"{name} {found[name] * 1e6:.1f} ({on_device[name] * 1e6:.1f})"
                    for name in (*self.names, "auto")
                )
                self.record.add(
                    f"auto, {what}, {n}x{self.width}: times the fastest",
                    found["auto"] / fastest,
                    most=NEAR_FASTEST,
                    note=f"µs a call (in a graph): {note}",
                    in_a_graph=round(on_device["auto"] / min(on_device[name] for name in self.names), 3),
                )

    def captured(self) -> None:
        """The edit of a captured decoding step of a model 2,048 wide: what steering a layer adds to the step."""
        width = 64 if self.rounds == 3 else 2048
        for n in (1, 16, 128):
            first, *args = SteerCase(n, width, n_edits=8, rank=1, rows="mixed", table=WIDE).make(
                torch.bfloat16, self.device
            )
            ways: dict[str, Sequence[Call]] = {"copy": [first.clone] * 64}
            for name in (*self.names, "auto"):
                ways[name] = [partial(steer, first, *args, backend=name)] * 64
            found = device_seconds(ways, self.rounds)
            note = ", ".join(f"{name} {seconds * 1e6:.2f}" for name, seconds in found.items())
            self.record.add(
                f"8 clamps by row, {n}x{width}, in a graph: auto", found["auto"] * 1e6, "µs", note=note
            )


def _how_launched() -> str:
    """Whether Triton's launches of the steer kernel were made again, or each by its own launcher."""
    starts = triton._kernel("steer")._launch._starts.values()
    again = triton.direct() is not None and all(start.recorded for start in starts)
    return "launches made again" if again else "by Triton's launcher"


def _step(args: ManyArgs, name: str) -> object:
    hidden, rows, strength, bias, left, right, gate = args
    return steer(hidden, rows, bias, left, right, strength=strength, gate=gate, backend=name)


def main() -> int:
    options = arguments(__doc__).parse_args()
    if not has_device(options):
        return 0
    bench = Bench(options, Record("steer", options))
    with torch.no_grad():
        bench.shares()
        bench.launches()
        bench.captured()
        bench.table()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
