"""The CUDA reduction's own source, run on the CPU over the op table: right indices, barriers and sums without a GPU."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch
from kernels_on_host import CAN_BUILD, WHY_NOT, built
from optable import DTYPES, LOGPROB_CASES, LogprobCase, with_head
from test_logprob_op import assert_close, both, wide
from tolerances import logprob_bounds
from torch import Tensor

from mechanex.backends import eager, native
from mechanex.backends.native import modules
from mechanex.ops.head import Head

MANY, FEW = 0, 132

pytestmark = [pytest.mark.ci, pytest.mark.skipif(not CAN_BUILD, reason=WHY_NOT)]


class Kernels:
    """Stands in for a compiled module; ``processors`` of 0 makes every call look like one of many rows."""

    def __init__(self, library: Path) -> None:
        self._reduce = ctypes.CDLL(str(library)).reduce_on_host
        long, address, number = ctypes.c_int64, ctypes.c_void_p, ctypes.c_double
        self._reduce.argtypes = [
            *(ctypes.c_int, long, long, address, address, address, long, long),
            *(number, number, number, address, address, address, ctypes.c_int, ctypes.c_uint),
        ]
        self.processors = FEW
        self.seed = 0
        self.threads: list[int] = []

    def reduce(self, *args: float) -> None:
        self.threads.append(self._reduce(*args, self.processors, self.seed))
        assert self.threads[-1], "the kernel failed; see stderr"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tmp_path_factory, "logprob")


@pytest.fixture
def kernels(library: Path, monkeypatch: pytest.MonkeyPatch) -> Kernels:
    found = Kernels(library)
    monkeypatch.setattr(modules, "cpu", lambda: found)
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case", [c for c in LOGPROB_CASES if c.n_rows < 100 and c.n_rows * c.n_vocab < 60_000], ids=str
)
def test_matches_the_oracle(case: LogprobCase, dtype: torch.dtype, kernels: Kernels) -> None:
    args = case.make(dtype)
    cotangent = torch.randn(case.n_rows, dtype=torch.float64)
    truth, d_truth = both(wide(args), cotangent, "reference")
    allowed, d_allowed = logprob_bounds(args, truth, d_truth, cotangent)
    out, _, slope, size = native.LOGPROB.with_slope(*with_head(args))
    assert_close(out, truth, allowed)
    assert_close((slope * (size * cotangent.to(size.dtype)).unsqueeze(1)).to(dtype), d_truth, d_allowed)
    assert torch.equal(native.LOGPROB.run(*with_head(args))[0], out)
    assert kernels.threads or case.n_rows == 0


def state(n_rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.full((n_rows,), -torch.inf, dtype=dtype), torch.zeros(n_rows, dtype=dtype)


@pytest.mark.parametrize("processors", [MANY, FEW])
@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("n_columns", [1, 31, 32, 4099, 9216])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_chunk_is_folded_as_plain_torch_folds_it(
    dtype: torch.dtype, n_columns: int, softcap: float | None, processors: int, kernels: Kernels
) -> None:
    """Products of every dtype that a vendor may give, each way to read them, first chunk and second."""
    kernels.processors = processors
    wide_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    target = torch.tensor([0, n_columns - 1, n_columns, 2 * n_columns - 1, -1])
    head = Head(torch.empty(2 * n_columns, 0), torch.randn(2 * n_columns, dtype=dtype), 0.7, softcap, 1.3)
    ours, theirs = state(5, wide_dtype), state(5, wide_dtype)
    for first in (0, n_columns):
        mine = torch.randn(5, n_columns, dtype=torch.float64).mul(3).to(dtype)
        other = mine.clone()
        factor, want = (torch.ones(5, 1, dtype=wide_dtype) for _ in range(2))
        native.LOGPROB.reduce(head, mine, first, target, *ours, factor, mine)
        eager.LOGPROB.reduce(head, other, first, target, *theirs, want, other)
        close = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
        torch.testing.assert_close(mine, other, rtol=close, atol=1e-6)
        sums = {"rtol": 1e-13 if dtype == torch.float64 else 1e-5, "atol": 0.0}
        for got, expected in ((factor, want), *zip(ours, theirs, strict=True)):
            torch.testing.assert_close(got, expected, **sums)
    per_access = 16 // dtype.itemsize
    pieces = n_columns // per_access if n_columns % per_access == 0 else n_columns
    threads = min(-(-pieces // 32) * 32, 256 if processors == MANY else 1024)
    assert kernels.threads == [threads if n_columns % per_access == 0 else -threads] * 2


def test_products_that_start_anywhere_are_read_element_by_element(kernels: Kernels) -> None:
    memory = torch.randn(1 + 3 * 64)
    head = Head(torch.empty(64, 0), None, 1.0, None, 1.0)
    mine, other = memory[1:].view(3, 64), memory[1:].view(3, 64).clone()
    ours, theirs = state(3, torch.float32), state(3, torch.float32)
    target = torch.tensor([5, 63, 64])
    native.LOGPROB.reduce(head, mine, 0, target, *ours, None, mine)
    eager.LOGPROB.reduce(head, other, 0, target, *theirs, None, other)
    torch.testing.assert_close(mine, other)
    assert kernels.threads == [-64]


def test_without_a_slope_the_products_stay(kernels: Kernels) -> None:
    products = torch.randn(3, 40)
    kept = products.clone()
    head = Head(torch.empty(40, 0), None, 1.0, None, 1.0)
    native.LOGPROB.reduce(head, products, 0, torch.tensor([1, 2, 3]), *state(3, torch.float32), None, None)
    assert torch.equal(products, kept)


def test_the_order_of_threads_changes_no_bit(kernels: Kernels) -> None:
    args = LogprobCase(5, 16, 3000, True, softcap=5.0).make(torch.float32)
    first = native.LOGPROB.with_slope(*with_head(args))
    for seed in (1, 2):
        kernels.seed = seed
        for one, other in zip(native.LOGPROB.with_slope(*with_head(args)), first, strict=True):
            assert torch.equal(one, other)


def test_tokens_ruled_out_before_any_other_and_numbers_that_are_none(kernels: Kernels) -> None:
    """A bias of minus infinity over a whole chunk; then NaN and infinity in one row, which stay there."""
    head = Head(torch.empty(64, 0), torch.full((64,), -torch.inf), 1.0, None, 1.0)
    maximum, total = state(2, torch.float32)
    products = torch.randn(2, 32)
    factor = torch.ones(2, 1)
    native.LOGPROB.reduce(head, products, 0, torch.tensor([3, 40]), maximum, total, factor, products)
    assert not products.any() and not total.any() and not factor.isnan().any()
    assert maximum.tolist() == [-torch.inf] * 2
    for bad in (torch.nan, torch.inf):
        plain = Head(torch.empty(64, 0), None, 1.0, None, 1.0)
        products = torch.zeros(2, 32)
        products[1, 7] = bad
        maximum, total = state(2, torch.float32)
        native.LOGPROB.reduce(plain, products, 0, torch.tensor([3, 40]), maximum, total, None, products)
        assert total.isnan().tolist() == [False, True]
        assert total[0] == 31
