"""The steer op on every backend that runs here, beside a copy of the same bytes."""

from __future__ import annotations

import pytest
import torch
from interleaved import medians
from optable import BENCHMARK_CASES, SteerCase

from mechanex import backends
from mechanex.ops.steer import steer

NAMES = [b.name for b in backends.backends() if b.missing() is None and b.name != "reference"]
DTYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("name", ["copy", *NAMES])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", BENCHMARK_CASES, ids=str)
def test_steer(report, benchmark, case: SteerCase, dtype: torch.dtype, name: str) -> None:  # type: ignore[no-untyped-def]
    """Median of one call; the bytes are those of hidden, read and written."""
    args = case.make(dtype)
    benchmark.group = title = f"steer op, {case} {dtype}"
    if name == "copy":
        benchmark(args[0].clone)
    else:
        benchmark(steer, *args, backend=name)
    report.add(title, {name: benchmark.stats.stats.median}, "copy", n_bytes=2 * args[0].nbytes)


@torch.no_grad()
@pytest.mark.parametrize("shape", [(1, 2048), (1, 8192), (512, 2048)], ids=str)
def test_crossing(report, benchmark, shape: tuple[int, int]) -> None:  # type: ignore[no-untyped-def]
    """One edit of rising rank, plain torch against the compiled kernels: what the constants of ``auto`` come from."""
    n, d = shape
    x, bias = torch.randn(n, d), torch.randn(1, d)
    repeats = max(1, 1000 // n)

    def call(rank: int, name: str):  # type: ignore[no-untyped-def]
        left, right = (torch.randn(1, rank, d) / d**0.5 for _ in range(2))
        return lambda: [steer(x, None, bias, left, right, backend=name) for _ in range(repeats)]

    for rank in (8, 16, 32, 48, 64):
        found = medians({f"{name}, rank {rank}": call(rank, name) for name in NAMES}, 11, settled=True)
        each = {name: seconds / repeats for name, seconds in found.items()}
        report.add(f"steer {list(shape)} float32, one edit by rank", each, f"eager, rank {rank}")
    benchmark.pedantic(call(8, NAMES[0]), rounds=1)
