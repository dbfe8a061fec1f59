"""The steer op on every backend that runs here, beside a copy of the same bytes."""

from __future__ import annotations

import pytest
import torch
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
