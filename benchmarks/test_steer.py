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
def test_steer(benchmark, case: SteerCase, dtype: torch.dtype, name: str) -> None:  # type: ignore[no-untyped-def]
    """Median of one call; ``extra_info`` holds the bytes of hidden read and written."""
    args = case.make(dtype)
    benchmark.group = f"{case} {dtype}"
    benchmark.extra_info["bytes"] = 2 * args[0].numel() * args[0].itemsize
    if name == "copy":
        benchmark(args[0].clone)
    else:
        benchmark(steer, *args, backend=name)
