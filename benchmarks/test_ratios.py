"""The steer op against the best plain-torch forms, and against a copy of the same bytes, in one run.

pytest benchmarks/test_ratios.py
"""

from __future__ import annotations

import pytest
import torch
from interleaved import medians

from mechanex.ops.steer import steer

ROUNDS = 41


@torch.no_grad()
def test_large_batch(report, benchmark):
    """[2048, 2048] float32: clamp and rank 4 against torch's rank forms, the dense matrix and a copy."""
    n = d = 2048
    x, v = torch.randn(n, d), torch.randn(d)
    direction = v / v.norm()
    clamp = (2 * v[None], -direction[None, None], direction[None, None])
    bias, left, right = torch.randn(1, d), torch.randn(1, 4, d) / 50, torch.randn(1, 4, d) / 50
    matrix = -torch.outer(direction, direction)
    folded = torch.cat([bias, left[0]])
    ones = torch.ones(n, 1)
    ways = {
        "copy (torch.clone)": x.clone,
        "clamp": lambda: steer(x, None, *clamp),
        "clamp by torch.addr": lambda: torch.addr(x + clamp[0], x @ direction, direction, alpha=-1),
        "clamp by a dense matrix": lambda: x + clamp[0] + x @ matrix.T,
        "rank 4": lambda: steer(x, None, bias, left, right),
        "rank 4 by torch.addmm": lambda: torch.addmm(x, torch.cat([ones, x @ right[0].T], 1), folded),
    }
    torch.testing.assert_close(ways["clamp"](), ways["clamp by torch.addr"](), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ways["clamp"](), ways["clamp by a dense matrix"](), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(ways["rank 4"](), ways["rank 4 by torch.addmm"](), rtol=1e-4, atol=1e-4)
    found = medians(ways, ROUNDS, settled=True)
    report.add("steer [2048, 2048] float32", found, "copy (torch.clone)", n_bytes=2 * x.nbytes)
    benchmark.pedantic(ways["rank 4"], rounds=3)


@torch.no_grad()
@pytest.mark.parametrize("rank", [0, 1, 4])
def test_mixed_batch(report, benchmark, rank):
    """[64, 2048] float32, a decode step of 64 requests: 16 different edits against one for all rows."""
    x, rows = torch.randn(64, 2048), torch.randint(0, 16, (64,), dtype=torch.int32)
    tables = [torch.randn(16, 2048)] + [torch.randn(16, rank, 2048) / 50 for _ in range(2) if rank]
    one, same = [t[:1].contiguous() for t in tables], torch.zeros(64, dtype=torch.int32)

    def repeat(run):
        return lambda: [run() for _ in range(100)]

    ways = {
        "one edit": repeat(lambda: steer(x, same, *one)),
        "16 edits": repeat(lambda: steer(x, rows, *tables)),
    }
    found = {name: seconds / 100 for name, seconds in medians(ways, ROUNDS).items()}
    report.add(
        f"steer [64, 2048] float32, rank {rank}, edits by row", found, "one edit", n_bytes=2 * x.nbytes
    )
    benchmark.pedantic(ways["16 edits"], rounds=3)
