"""The one walk of a log-probability's gradient: its own CUDA source, run on the CPU with clusters and copies."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch
from kernels_on_host import CAN_BUILD, WHY_NOT, built
from optable import LogprobCase, with_head
from test_logprob_op import assert_close, both, wide
from tolerances import logprob_bounds
from torch import Tensor

from mechanex.backends import native
from mechanex.backends.chunked import Chunked
from mechanex.backends.native.logprob import walk_with
from mechanex.ops.head import Head

# What a block may have on the chips with clusters.
MOST_SHARED = 227 * 1024

pytestmark = [pytest.mark.ci, pytest.mark.skipif(not CAN_BUILD, reason=WHY_NOT)]


class Module:
    """Stands in for the compiled module on a GPU that has ``processors`` clusters."""

    def __init__(self, library: Path) -> None:
        self._walk = ctypes.CDLL(str(library)).walk_on_host
        long, address, number = ctypes.c_int64, ctypes.c_void_p, ctypes.c_double
        self._walk.argtypes = [
            *(ctypes.c_int, long, long, long, address, long, address, long, address, address, long),
            *(number, number, number, address, address, address, long, ctypes.c_size_t, ctypes.c_uint),
        ]
        self.most_groups, self.most_shared, self.seed = 2, MOST_SHARED, 0
        self.sizes: list[int] = []

    def walk_groups(self, dtype: int, n_rows: int, n_vocab: int, width: int, device: int) -> int:
        return min(self.most_groups, -(-n_vocab // 64))

    def walk(self, *args: float) -> None:
        *given, _, _ = args
        self.sizes.append(self._walk(*given, self.most_shared, self.seed))
        assert self.sizes[-1] > 0, "no kernel, or it failed; see stderr"

    def op(self) -> Chunked:
        def walk(head: Head, hidden: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
            return walk_with(self, head, hidden, target, (0, 0))

        return Chunked(native.LOGPROB.reduce, walk)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tmp_path_factory, "logprob_walk")


@pytest.fixture
def module(library: Path) -> Module:
    return Module(library)


CASES = [
    (LogprobCase(1, 32, 1), 1),
    (LogprobCase(3, 96, 63), 1),
    (LogprobCase(16, 512, 200, True, softcap=4.0), 1),
    (LogprobCase(17, 768, 130, True), 2),
    (LogprobCase(33, 1152, 129, softcap=30.0, scale=0.7), 4),
    (LogprobCase(64, 1024, 100, coldness=1.7), 2),
    (LogprobCase(5, 4096, 190, True), 8),
    (LogprobCase(64, 4096, 70), 8),
]


@pytest.mark.parametrize(
    ("case", "size", "dtype"),
    [
        (case, size, dtype)
        for case, size in CASES
        for dtype in (torch.bfloat16, torch.float16)
        if case.n_rows * case.width < 100_000 or dtype is torch.bfloat16
    ],
    ids=str,
)
def test_matches_the_oracle(case: LogprobCase, size: int, dtype: torch.dtype, module: Module) -> None:
    args = case.make(dtype)
    cotangent = torch.randn(case.n_rows, dtype=torch.float64)
    truth, d_truth = both(wide(args), cotangent, "reference")
    allowed, d_allowed = logprob_bounds(args, truth, d_truth, cotangent, multiplies_halves=True)
    out, _, slope, scale = module.op().with_slope(*with_head(args))
    assert module.sizes == [size]
    assert_close(out, truth, allowed)
    assert_close((slope * (scale * cotangent.to(scale.dtype)).unsqueeze(1)).to(dtype), d_truth, d_allowed)


@pytest.mark.parametrize("groups", [1, 3, 40])
def test_however_many_clusters_share_the_tokens(groups: int, module: Module) -> None:
    """More tiles than clusters, fewer, and stages of copies that a small memory leaves."""
    args = LogprobCase(20, 256, 700).make(torch.bfloat16)
    ones = torch.ones(20, dtype=torch.float64)
    truth, d_truth = both(wide(args), ones, "reference")
    allowed, d_allowed = logprob_bounds(args, truth, d_truth, ones, multiplies_halves=True)
    module.most_groups = groups
    for shared in (MOST_SHARED, 120 * 1024):
        module.most_shared = shared
        out, _, slope, size = module.op().with_slope(*with_head(args))
        assert_close(out, truth, allowed)
        assert_close((slope * size.unsqueeze(1)).to(torch.bfloat16), d_truth, d_allowed)


def test_the_order_of_threads_changes_no_bit(module: Module) -> None:
    args = LogprobCase(9, 640, 300, True, softcap=5.0).make(torch.bfloat16)
    first = module.op().with_slope(*with_head(args))
    for seed in (1, 2):
        module.seed = seed
        for one, other in zip(module.op().with_slope(*with_head(args)), first, strict=True):
            assert torch.equal(one, other)


def test_tokens_ruled_out_targets_outside_and_numbers_that_are_none(module: Module) -> None:
    hidden = torch.randn(4, 64, dtype=torch.bfloat16)
    weight = torch.randn(150, 64, dtype=torch.bfloat16)
    bias = torch.zeros(150)
    bias[:64] = -torch.inf
    target = torch.tensor([3, 100, -1, 149])
    hidden[3, 7] = torch.nan
    head = Head(weight, bias, 1.0, None, 1.0)
    maximum, total, sums = walk_with(module, head, hidden, target, (0, 0))
    logits = hidden.float() @ weight.float().T + bias
    logits[1, 100] = -torch.inf
    shares = torch.exp(logits[:3] - maximum[:3, None])
    torch.testing.assert_close(maximum[:3], logits[:3].amax(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(total[:3], shares.sum(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sums[:3], shares @ weight.float(), rtol=2e-2, atol=2e-2)
    assert total[3].isnan() and sums[3].isnan().all()
    nothing = Head(weight, torch.full((150,), -torch.inf), 1.0, None, 1.0)
    maximum, total, sums = walk_with(module, nothing, hidden[:3], target[:3], (0, 0))
    assert maximum.tolist() == [-torch.inf] * 3
    assert not total.any() and not sums.any()


def test_what_it_does_not_serve_is_left_to_the_walk_by_chunks(module: Module) -> None:
    for case, dtype in ((LogprobCase(3, 64, 90), torch.float32), (LogprobCase(3, 60, 90), torch.bfloat16)):
        args = case.make(dtype)
        hidden, head, target = with_head(args)
        module.most_groups = 0
        assert walk_with(module, head, hidden, target, (0, 0)) is None
    weight = torch.randn(90, 72, dtype=torch.bfloat16)[:, 4:68]
    module.most_groups = 2
    head = Head(weight, None, 1.0, None, 1.0)
    hidden, target = torch.randn(3, 64, dtype=torch.bfloat16), torch.tensor([1, 2, 3])
    assert walk_with(module, head, hidden, target, (0, 0)) is None
    assert module.sizes == []
