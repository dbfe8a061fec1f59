"""What only a GPU can show of the steer op: streams, graphs, layouts of real sizes, no waiting; skipped without one."""

from __future__ import annotations

import pytest
import torch
from optable import DTYPES, SteerCase
from test_steer_op import widened
from tolerances import assert_within, many_truth

from mechanex import backends
from mechanex.backends import reference
from mechanex.backends.native import modules
from mechanex.errors import ValidationError
from mechanex.ops.steer import steer

HAS_GPU = torch.cuda.is_available()
NAMES = [b.name for b in backends.backends() if HAS_GPU and "steer" in b.ops and b.lacks("cuda") is None]
FAST = [name for name in NAMES if name != "reference"] or ["none"]
NEEDS_NATIVE = pytest.mark.skipif("native" not in FAST, reason="no CUDA module")

pytestmark = pytest.mark.gpu

# Enough rows for tiles on any GPU; a wide row; every edit of many; a row that nothing but single elements can reach.
LARGE = (
    SteerCase(8192, 512, rank=1),
    SteerCase(8192, 512, n_edits=16, rank=4, rows="mixed"),
    SteerCase(4099, 4096, rank=4),
    SteerCase(4099, 4096, n_edits=3, rank=3, rows="mixed"),
    SteerCase(37, 16384, rank=5),
    SteerCase(64, 2048, n_edits=16, rank=1, rows="mixed"),
    SteerCase(1, 32768, rank=2),
    SteerCase(3, 65536, rank=1),
    SteerCase(4099, 4095, n_edits=2, rank=2, rows="mixed"),
)


def oracle(args: tuple[torch.Tensor | None, ...]) -> torch.Tensor:
    """The reference on the GPU, all rows of one edit at a time: row by row would take minutes."""
    hidden, rows, bias, left, right = args
    out = hidden.clone()
    for k in range(bias.shape[0]):
        chosen = slice(None) if rows is None else (rows == k).nonzero()[:, 0]
        x = hidden[chosen]
        y = x + bias[k]
        if left is not None:
            y = y + (x @ right[k].T) @ left[k]
        out[chosen] = y
    return out


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_large_shapes_match_the_oracle(case: SteerCase, dtype: torch.dtype, backend: str) -> None:
    args = case.make(dtype, "cuda")
    if backends.get(backend).ops["steer"].refuses(*args) is not None:
        with pytest.raises(ValidationError, match="can't compute this steer"):
            steer(*args, backend=backend)
        return
    out = steer(*args, backend=backend)
    assert_within(out, oracle(widened(args)), oracle(widened(args, magnitude=True)), case.width)


def test_the_oracle_above_is_the_reference() -> None:
    args = widened(SteerCase(9, 64, n_edits=3, rank=2, rows="mixed").make(torch.float64, "cuda"))
    torch.testing.assert_close(oracle(args), reference.steer(*args))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("table", [None, torch.float32], ids=str)
@pytest.mark.parametrize("n_rows", [33, 4099])
@pytest.mark.parametrize("width", [64, 47])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unedited_rows_keep_their_bits_and_bad_indices_give_nan(
    dtype: torch.dtype, width: int, n_rows: int, table: torch.dtype | None, backend: str
) -> None:
    table = None if dtype == torch.float64 else table
    hidden, rows, *tables = SteerCase(n_rows, width, n_edits=3, rank=2, rows="mixed", table=table).make(
        dtype, "cuda"
    )
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    hidden[0, :4] = torch.tensor([-0.0, float("inf"), float("-inf"), float("nan")], dtype=dtype)
    rows[0] = -1
    rows[5:9] = torch.tensor([-2, 3, 2**31 - 1, -(2**31)], dtype=torch.int32)
    out = steer(hidden, rows, *tables, backend=backend)
    assert torch.equal(out.view(integer)[rows == -1], hidden.view(integer)[rows == -1])
    assert out[5:9].isnan().all()
    assert not out[(rows >= 0) & (rows < 3)].isnan().any()


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_round_to_nearest_even(dtype: torch.dtype, backend: str) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).view(64, 1024)
    for shift in (0.0, 0.00137, 1.37):
        bias = torch.full((1, 1024), shift)
        want = (every.float() + bias).to(dtype)
        got = steer(every.cuda(), None, bias.cuda(), backend=backend).cpu()
        assert torch.equal(got.isnan(), want.isnan())
        assert torch.equal(got.nan_to_num(0.0), want.nan_to_num(0.0))


@pytest.mark.parametrize("backend", FAST)
def test_the_same_call_gives_the_same_bits(backend: str) -> None:
    args = SteerCase(4099, 4096, n_edits=3, rank=4, rows="mixed").make(torch.bfloat16, "cuda")
    first = steer(*args, backend=backend)
    assert all(torch.equal(steer(*args, backend=backend), first) for _ in range(5))


@pytest.mark.parametrize("backend", FAST)
def test_a_call_does_not_wait_for_the_device(backend: str) -> None:
    args = SteerCase(64, 2048, n_edits=4, rank=2, rows="mixed").make(torch.bfloat16, "cuda")
    steer(*args, backend=backend)
    torch.cuda.set_sync_debug_mode("error")
    try:
        steer(*args, backend=backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("backend", FAST)
def test_work_goes_to_the_current_stream(backend: str) -> None:
    hidden, rows, *tables = SteerCase(512, 1024, n_edits=2, rank=2, rows="mixed").make(torch.float32, "cuda")
    want = steer(hidden, rows, *tables, backend=backend)
    late = torch.zeros_like(hidden)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        # The argument is ready long after the call: only the same stream orders them.
        torch.cuda._sleep(50_000_000)
        late.copy_(hidden)
        got = steer(late, rows, *tables, backend=backend)
    stream.synchronize()
    assert torch.equal(got, want)


@pytest.mark.parametrize("backend", FAST)
def test_a_graph_can_hold_the_call(backend: str) -> None:
    hidden, rows, *tables = SteerCase(64, 1024, n_edits=2, rank=2, rows="mixed").make(torch.bfloat16, "cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        steer(hidden, rows, *tables, backend=backend)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = steer(hidden, rows, *tables, backend=backend)
    hidden.copy_(torch.randn_like(hidden))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, steer(hidden, rows, *tables, backend=backend))


# Strengths, one edit a row: the widths that kernels lay out in their own ways, every rank that they treat apart.
SCALED = tuple(
    SteerCase(21, width, n_edits=n_edits, rank=rank, rows=rows, table=torch.float32)
    for width in (64, 4096, 16384)
    for rank in (0, 1, 3, 4)
    for n_edits, rows in ((3, "mixed"), (1, "none"))
)
SCALED_NAMES = ["auto", *(name for name in FAST if name in ("native", "clusters"))] if HAS_GPU else ["none"]


def strengths(case: SteerCase, shape: str) -> torch.Tensor | None:
    """One number a row, in one of the shapes that the op takes."""
    generator = torch.Generator().manual_seed(1)
    numbers = torch.randn(case.n_rows, generator=generator).cuda()
    return None if shape == "none" else numbers[:, None] if shape == "column" else numbers


def expected(
    args: tuple[torch.Tensor | None, ...], strength: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The truth and its magnitudes, by the reference."""
    hidden, rows, *tables = (None if t is None else t.cpu() for t in args)
    numbers = torch.ones(hidden.shape[0]) if strength is None else strength.cpu().reshape(-1)
    rows = torch.zeros(hidden.shape[0], dtype=torch.int32) if rows is None else rows
    return many_truth((hidden, rows[:, None], numbers[:, None], *tables, None))


@pytest.mark.parametrize("backend", SCALED_NAMES)
@pytest.mark.parametrize("shape", ["row", "column", "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", SCALED, ids=str)
def test_one_edit_a_row_with_strengths_matches_the_oracle(
    case: SteerCase, dtype: torch.dtype, shape: str, backend: str
) -> None:
    hidden, rows, *tables = args = case.make(dtype, "cuda")
    if shape == "column" and rows is not None:
        rows = rows[:, None]
    elif shape == "column":
        pytest.skip("one edit for all takes one strength a row")
    strength = strengths(case, shape)
    out = steer(hidden, rows, *tables, strength=strength, backend=backend)
    truth, scale = expected(args, strength)
    assert out.dtype is dtype
    assert_within(out.cpu(), truth, scale, case.width)


@pytest.mark.parametrize("backend", SCALED_NAMES)
@pytest.mark.parametrize("width", [64, 4096, 16384])
def test_a_graph_can_hold_strengths_and_no_call_with_them_waits(width: int, backend: str) -> None:
    case = SteerCase(21, width, n_edits=3, rank=3, rows="mixed", table=torch.float32)
    hidden, rows, *tables = args = case.make(torch.bfloat16, "cuda")
    strength = strengths(case, "row")
    first = steer(hidden, rows, *tables, strength=strength, backend=backend)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        steer(hidden, rows, *tables, strength=strength, backend=backend)
    stream.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = steer(hidden, rows, *tables, strength=strength, backend=backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(again, first)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = steer(hidden, rows, *tables, strength=strength, backend=backend)
    hidden.copy_(torch.randn_like(hidden))
    strength.mul_(-2)
    graph.replay()
    torch.cuda.synchronize()
    assert_within(out.cpu(), *expected(args, strength), width)


@NEEDS_NATIVE
def test_what_cuda_refuses_is_an_exception_with_its_words() -> None:
    module = modules.cuda()
    with pytest.raises(RuntimeError, match="cudaSetDevice: invalid device ordinal"):
        module.steer(0, 0, 1, 4, 0, 4, 0, 4, 0, 0, 0, 0, 0, 0, 1, 0, 99, 0)
    with pytest.raises(ValueError, match="no kernel for rows of dtype code 0 and edits of 2"):
        module.steer(0, 2, 1, 4, 0, 4, 0, 4, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0)
    x = torch.ones(2, 4, device="cuda")
    assert steer(x, None, x[:1], backend="native").tolist() == [[2.0] * 4] * 2


@NEEDS_NATIVE
def test_more_rows_than_a_launch_holds_would_be_cut() -> None:
    # One column and 2**31 + 5 rows of a half type: 8 GiB in and out, so only where that is little.
    if torch.cuda.get_device_properties(0).total_memory < 60 * 2**30:
        pytest.skip("needs a large GPU")
    n = 2**31 + 5
    hidden = torch.zeros(n, 1, dtype=torch.float16, device="cuda")
    out = steer(hidden, None, torch.ones(1, 1, device="cuda"), backend="native")
    assert out[[0, 1, 2**31 - 2, 2**31 - 1, 2**31, n - 1], 0].tolist() == [1.0] * 6
    assert float(out.amin()) == 1.0


@NEEDS_NATIVE
@pytest.mark.skipif(not HAS_GPU or torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_tensor_decides_the_device_and_the_current_one_stays() -> None:
    args = [None if t is None else t.to("cuda:1") for t in SteerCase(5, 64, rank=1).make(torch.float32)]
    out = steer(*args, backend="native")
    assert out.device.index == 1 and torch.cuda.current_device() == 0
    torch.testing.assert_close(out, steer(*args, backend="reference"))
