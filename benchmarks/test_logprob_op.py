"""The completion_logprob op on every backend that runs here, beside the matrix product that it can't do without.

Plain torch makes every logit, then takes torch.log_softmax and gathers: the way for few rows, and the one that `auto`
has to beat. The table of crossings shows where it does.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from interleaved import medians
from measure import peak_bytes
from optable import LOGPROB_BENCHMARK_CASES, LogprobCase
from torch import Tensor

from mechanex import backends
from mechanex.ops.logprob import completion_logprob

NAMES = [
    b.name
    for b in backends.backends()
    if "completion_logprob" in b.ops and b.lacks("cpu") is None and b.name != "reference"
]
PRODUCT, PLAIN = "product alone", "log_softmax, gather"


def ways(case: LogprobCase, dtype: torch.dtype) -> dict[str, Callable[[Tensor], Tensor]]:
    """By name, from hidden to log-probabilities."""
    _, weight, target, *_ = case.make(dtype)

    def plain(hidden: Tensor) -> Tensor:
        return torch.log_softmax((hidden @ weight.T).float(), 1).gather(1, target.unsqueeze(1)).squeeze(1)

    def ours(name: str) -> Callable[[Tensor], Tensor]:
        return lambda hidden: completion_logprob(hidden, weight, target, backend=name)

    return {PRODUCT: lambda hidden: hidden @ weight.T, PLAIN: plain, **{name: ours(name) for name in NAMES}}


CALLS = [
    *((case, torch.float32) for case in LOGPROB_BENCHMARK_CASES),
    *((case, torch.bfloat16) for case in LOGPROB_BENCHMARK_CASES if case.n_rows in (64, 256)),
]


@pytest.mark.parametrize(("case", "dtype"), CALLS, ids=str)
def test_logprob(report, benchmark, case: LogprobCase, dtype: torch.dtype) -> None:  # type: ignore[no-untyped-def]
    """Forward, and forward with backward; ratios are to the product alone, forward."""
    logits = case.n_rows * case.n_vocab
    hidden = case.make(dtype)[0]
    leaf = hidden.clone().requires_grad_()
    calls = ways(case, dtype)
    rounds = 1 if logits > 1 << 24 else 3 if logits > 1 << 22 else 9
    title = f"completion_logprob {case.n_rows}x{case.width}x{case.n_vocab} {dtype}".replace("torch.", "")
    forward = {name: lambda run=run: run(hidden) for name, run in calls.items()}
    found = medians(forward, rounds)
    notes = {}
    if logits == 1 << 22:
        notes = {name: f"peak {peak_bytes(run) / 1e6:.1f} MB" for name, run in forward.items()}
    report.add(title, found, PRODUCT, notes=notes)
    if logits <= 1 << 25:
        backward = {
            f"{name}, backward": lambda run=run: torch.autograd.grad(run(leaf).sum(), leaf)
            for name, run in calls.items()
            if name != PRODUCT
        }
        report.add(title, medians(backward, min(rounds, 5)), PRODUCT)
    benchmark.pedantic(forward[NAMES[-1]], rounds=1)


@torch.no_grad()
@pytest.mark.parametrize("width", [128, 512])
def test_crossing(report, benchmark, width: int) -> None:  # type: ignore[no-untyped-def]
    """Few logits: where the plain way ends to be faster. It is less exact: 1 − p of its log p has lost its digits."""
    for n_rows, n_vocab in ((4, 1024), (16, 1024), (64, 1024), (16, 16384), (64, 16384)):
        case = LogprobCase(n_rows, width, n_vocab)
        hidden = case.make(torch.float32)[0]
        found = medians(
            {
                f"{name}, {n_rows}x{n_vocab}": lambda run=run, hidden=hidden: [run(hidden) for _ in range(10)]
                for name, run in ways(case, torch.float32).items()
                if name != PRODUCT
            },
            9,
            settled=True,
        )
        each = {name: seconds / 10 for name, seconds in found.items()}
        report.add(
            f"completion_logprob of few logits, {width} wide, float32", each, f"{PLAIN}, {n_rows}x{n_vocab}"
        )
    benchmark.pedantic(lambda: ways(case, torch.float32)[NAMES[-1]](hidden), rounds=1)
