"""The CUDA kernels' own source, run on the CPU over the op table: right indices, barriers and layouts without a GPU."""

from __future__ import annotations

import ctypes
import dataclasses
from pathlib import Path

import pytest
import torch
from kernels_on_host import CAN_BUILD, WHY_NOT, built
from optable import CASES, DTYPES, MANY_CASES, ManyCase, SteerCase, with_edits
from test_steer_op import guarded, widened
from tolerances import assert_within, many_truth
from torch import Tensor

from mechanex.backends import native, reference
from mechanex.backends.native import clusters, edits, modules
from mechanex.ops.edits import StackedEdits
from mechanex.ops.gate import KINDS

TILE, ROW, WIDE, ANY = range(4)
# What a block may have on the chips with clusters.
MOST_SHARED = 227 * 1024

pytestmark = [pytest.mark.ci, pytest.mark.skipif(not CAN_BUILD, reason=WHY_NOT)]

# Shapes that the op table need not have: a tile that isn't full, rows of a tile that differ, rows in many registers.
LAYOUTS = (
    SteerCase(5, 256, rank=1),
    SteerCase(9, 512, n_edits=2, rank=4, rows="mixed"),
    SteerCase(8, 64, n_edits=2, rank=5, rows="mixed"),
    SteerCase(2, 16384, rank=3),
    SteerCase(2, 16384, n_edits=2, rank=1, rows="mixed"),
    SteerCase(1, 40000, rank=1),
)


class Kernels:
    """Stands in for ``mechanex._native_cuda``; ``processors`` of 0 makes every call look like one of many rows."""

    def __init__(self, library: Path) -> None:
        loaded = ctypes.CDLL(str(library))
        self._steer = loaded.steer_on_host
        self._steer_many = loaded.steer_many_on_host
        long, address = ctypes.c_int64, ctypes.c_void_p
        self._steer.argtypes = [
            *(ctypes.c_int, ctypes.c_int, long, long, address, long, address, long, address, long),
            *(address, address, address, address, long, long, ctypes.c_int, ctypes.c_uint),
        ]
        self._slices = loaded.steer_slices_on_host
        self._slices.argtypes = [*self._steer.argtypes[:-2], long, ctypes.c_size_t, ctypes.c_uint]
        self._steer_many.argtypes = [
            *(ctypes.c_int, ctypes.c_int, long, long, address, long, address, long, address, long),
            *(address,) * 7,
            *(long, long, ctypes.c_uint),
        ]
        self.processors = 0
        self.clusters, self.most_shared = 2, MOST_SHARED
        self.seed = 0
        self.layouts: list[int] = []
        self.sizes: list[int] = []

    def steer(self, *args: int) -> bool:
        *arguments, _device, _stream = args
        self.layouts.append(self._steer(*arguments, self.processors, self.seed))
        assert self.layouts[-1] >= 0, "the kernel failed; see stderr"
        return True

    def steer_slices(self, *args: int) -> bool:
        *arguments, _device, _stream = args
        self.sizes.append(self._slices(*arguments, self.clusters, self.most_shared, self.seed))
        assert self.sizes[-1] >= 0, "the kernel failed; see stderr"
        return self.sizes[-1] > 0

    def steer_many(self, *args: int) -> None:
        *arguments, _device, _stream = args
        assert self._steer_many(*arguments, self.seed) >= 0, "the kernel failed; see stderr"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tmp_path_factory, "steer")


@pytest.fixture
def kernels(library: Path, monkeypatch: pytest.MonkeyPatch) -> Kernels:
    found = Kernels(library)
    monkeypatch.setattr(modules, "cuda", lambda: found)
    monkeypatch.setattr(modules, "stream_of", lambda device: 0)
    # Tensors of the CPU pass for a GPU's.
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.Tensor, "get_device", lambda self: 0)
    return found


@pytest.mark.parametrize("processors", [0, 132])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", (*CASES, *LAYOUTS), ids=str)
def test_matches_the_oracle(case: SteerCase, dtype: torch.dtype, processors: int, kernels: Kernels) -> None:
    kernels.processors, kernels.seed = processors, 7
    args = case.make(dtype)
    with guarded():
        out = native.steer(*args)
    assert out.dtype == dtype
    truth, scale = reference.steer(*widened(args)), reference.steer(*widened(args, magnitude=True))
    assert_within(out, truth, scale, case.width)
    assert len(kernels.layouts) == 1


@pytest.mark.parametrize(
    ("case", "processors", "layout"),
    [
        (SteerCase(64, 512), 0, TILE),
        (SteerCase(64, 512), 132, ROW),
        (SteerCase(4, 4096, rank=1), 0, WIDE),
        (SteerCase(4, 4096, rank=1), 132, ROW),
        (SteerCase(1, 8192, rank=1), 132, WIDE),
        (SteerCase(4, 47), 0, ANY),
        (SteerCase(4, 64, layout="offset"), 0, ANY),
        (SteerCase(4, 64, layout="sliced"), 0, ANY),
        (SteerCase(4, 64, layout="skipping"), 0, TILE),
        (SteerCase(1, 40000), 0, ANY),
    ],
    ids=str,
)
def test_the_layout_fits_the_call(case: SteerCase, processors: int, layout: int, kernels: Kernels) -> None:
    kernels.processors = processors
    native.steer(*case.make(torch.float32))
    assert kernels.layouts == [layout]


@pytest.mark.parametrize("processors", [0, 132])
@pytest.mark.parametrize("width", [64, 47])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unedited_rows_keep_their_bits_and_bad_indices_give_nan(
    dtype: torch.dtype, width: int, processors: int, kernels: Kernels
) -> None:
    kernels.processors = processors
    hidden, rows, *tables = SteerCase(33, width, n_edits=3, rank=2, rows="mixed").make(dtype)
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    # A signalling NaN too: its bits must survive.
    hidden.view(integer)[0, :3] = torch.tensor([-1, 1, torch.iinfo(integer).min], dtype=integer)
    rows[0] = -1
    bad = torch.tensor([-2, 3, 2**31 - 1, -(2**31)], dtype=torch.int32)
    rows[5:9] = bad
    out = native.steer(hidden, rows, *tables)
    assert torch.equal(out.view(integer)[rows == -1], hidden.view(integer)[rows == -1])
    assert out[5:9].isnan().all()
    rows[5:9] = -1
    again = native.steer(hidden, rows, *tables)
    others = [i for i in range(33) if not 5 <= i < 9]
    assert torch.equal(out.view(integer)[others], again.view(integer)[others])


@pytest.mark.parametrize("processors", [0, 132])
def test_an_infinite_element_stays_in_its_column(processors: int, kernels: Kernels) -> None:
    kernels.processors = processors
    hidden, _, bias, left, right = SteerCase(8, 64, rank=3).make(torch.float32)
    hidden[:, 5] = float("inf")
    right[:, :, 5] = right[:, :, 5].abs()
    left[:] = 0.5
    out = native.steer(hidden, None, bias, left, right)
    assert out.isposinf().all()


@pytest.mark.parametrize("processors", [0, 132])
def test_the_order_of_threads_changes_no_bit(processors: int, kernels: Kernels) -> None:
    kernels.processors = processors
    args = SteerCase(9, 512, n_edits=2, rank=4, rows="mixed").make(torch.float32)
    first = native.steer(*args)
    for seed in (1, 2):
        kernels.seed = seed
        assert torch.equal(native.steer(*args), first)


def test_half_types_round_to_nearest_even(kernels: Kernels) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).view(64, 1024)
        shift = torch.full((1, 1024), 0.00137)
        want = (every.float() + shift).to(dtype)
        got = native.steer(every, None, shift, None, None)
        assert torch.equal(got.isnan(), want.isnan())
        assert torch.equal(got.nan_to_num(0.0), want.nan_to_num(0.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", MANY_CASES, ids=str)
def test_several_edits_match_the_oracle(case: ManyCase, dtype: torch.dtype, kernels: Kernels) -> None:
    kernels.seed = 7
    args = case.make(dtype)
    with guarded():
        out = native.steer_many(*with_edits(args))
    truth, scale = many_truth(args)
    assert out.dtype == dtype
    assert_within(out, truth, scale, case.base.width)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_edits_keep_rows_without_one_and_bad_indices_give_nan(
    dtype: torch.dtype, kernels: Kernels
) -> None:
    args = ManyCase(SteerCase(9, 47, n_edits=5, rank=2, rows="mixed"), 2, True, KINDS).make(dtype)
    hidden, rows = args[:2]
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    hidden.view(integer)[0, :3] = torch.tensor([-1, 1, torch.iinfo(integer).min], dtype=integer)
    rows[0] = -1
    rows[5:9, 1] = torch.tensor([-2, 5, 2**31 - 1, -(2**31)], dtype=torch.int32)
    out = native.steer_many(*with_edits(args))
    assert torch.equal(out[0].view(integer), hidden[0].view(integer))
    assert out[5:9].isnan().all() and not out[1:5].isnan().any()
    for seed in (1, 2):
        kernels.seed = seed
        assert torch.equal(native.steer_many(*with_edits(args)).view(integer), out.view(integer))


def test_the_widest_row_of_a_half_type_fits_a_block(kernels: Kernels) -> None:
    wide = ManyCase(SteerCase(1, edits.MANY_WIDTH, n_edits=2, rank=4, rows="mixed"), 2, True, ("norm",))
    args = wide.make(torch.bfloat16)
    assert edits.refuses_steer_many(*with_edits(args)) is None
    truth, scale = many_truth(args)
    assert_within(native.steer_many(*with_edits(args)), truth, scale, edits.MANY_WIDTH)
    wider = SteerCase(1, edits.MANY_WIDTH + 8, n_edits=2, rank=1, rows="mixed")
    for case in (ManyCase(wider, 2, True), ManyCase(wider, 1, True, ("relu",))):
        assert "the width is 24008" in edits.refuses_steer_many(*with_edits(case.make(torch.bfloat16)))
        assert edits.refuses_steer_many(*with_edits(case.make(torch.float32))) is None
    # One edit with a strength takes the kernels of one edit, which have no such limit.
    alone = ManyCase(wider, 1, True).make(torch.bfloat16)
    assert edits.refuses_steer_many(*with_edits(alone)) is None
    assert_within(native.steer_many(*with_edits(alone)), *many_truth(alone), wider.width)


# Rows that fill no tile, several tiles of a cluster, columns that fill no access of every lane, many edits; and the
# blocks among which bfloat16 rows with float32 edits are shared.
SLICES = (
    (SteerCase(70, 4096, rank=4), 8),
    (SteerCase(133, 2048, n_edits=16, rank=1, rows="mixed"), 4),
    (SteerCase(3, 1024, n_edits=3, rank=3, rows="mixed"), 2),
    (SteerCase(200, 64, rank=2), 1),
    (SteerCase(33, 1280, n_edits=2, rank=6, rows="mixed", layout="skipping"), 4),
    (SteerCase(64, 512, n_edits=9, rank=8, rows="mixed"), 2),
)


@pytest.mark.parametrize("table", [None, torch.float32], ids=["own", "float32"])
@pytest.mark.parametrize("dtype", [t for t in DTYPES if t is not torch.float64], ids=str)
@pytest.mark.parametrize(("case", "size"), SLICES, ids=str)
def test_clusters_match_the_oracle(
    case: SteerCase, size: int, dtype: torch.dtype, table: torch.dtype | None, kernels: Kernels
) -> None:
    kernels.seed = 7
    args = dataclasses.replace(case, table=table).make(dtype)
    strength = torch.randn(case.n_rows, dtype=torch.float64).float()
    hidden, rows, *tables = args
    with guarded():
        plain = clusters.steer(*args)
        scaled = clusters.steer_many(
            hidden, None if rows is None else rows[:, None], strength[:, None], StackedEdits(*tables)
        )
    truth, scale = reference.steer(*widened(args)), reference.steer(*widened(args, magnitude=True))
    assert_within(plain, truth, scale, case.width)
    many = (hidden, None if rows is None else rows[:, None], strength[:, None], *tables, None)
    assert_within(scaled, *many_truth(many), case.width)
    assert kernels.sizes[0] == kernels.sizes[1] > 0
    if dtype is torch.bfloat16 and table is torch.float32:
        assert kernels.sizes[0] == size
    assert not kernels.layouts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_clusters_keep_rows_without_an_edit_and_give_the_same_bits_whoever_takes_them(
    dtype: torch.dtype, kernels: Kernels
) -> None:
    hidden, rows, *tables = SteerCase(150, 128, n_edits=3, rank=2, rows="mixed").make(dtype)
    integer = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    hidden.view(integer)[0, :3] = torch.tensor([-1, 1, torch.iinfo(integer).min], dtype=integer)
    rows[0] = -1
    rows[5:9] = torch.tensor([-2, 3, 2**31 - 1, -(2**31)], dtype=torch.int32)
    # Rows that share an edit, and are read together, beside the same edit alone.
    rows[64:] = 1
    out = clusters.steer(hidden, rows, *tables)
    assert torch.equal(out.view(integer)[rows == -1], hidden.view(integer)[rows == -1])
    assert out[5:9].isnan().all()
    assert not out[(rows >= 0) & (rows < 3)].isnan().any()
    for seed, most, shared in ((1, 1, MOST_SHARED), (2, 3, 80 * 1024)):
        kernels.seed, kernels.clusters, kernels.most_shared = seed, most, shared
        assert torch.equal(clusters.steer(hidden, rows, *tables).view(integer), out.view(integer))
    one = [t[1:2].contiguous() for t in tables]
    assert torch.equal(clusters.steer(hidden, None, *one)[64:], out[64:])
    # The gradient for the hidden state has no bias.
    plain = clusters.steer(hidden, rows, None, *tables[1:])
    assert torch.equal(plain[64:], clusters.steer(hidden, None, torch.zeros_like(one[0]), *one[1:])[64:])
    assert all(kernels.sizes) and not kernels.layouts


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        (SteerCase(5, 64), torch.float32),
        (SteerCase(5, 64, rank=1), torch.float64),
        (SteerCase(5, 47, rank=1), torch.float32),
        (SteerCase(3, 8192, rank=1), torch.bfloat16),
        (SteerCase(3, 4096, n_edits=60, rank=2, rows="mixed"), torch.bfloat16),
    ],
    ids=str,
)
def test_what_clusters_do_not_serve_goes_to_the_other_kernels(
    case: SteerCase, dtype: torch.dtype, kernels: Kernels
) -> None:
    args = case.make(dtype)
    out = clusters.steer(*args)
    assert kernels.sizes == [0] and len(kernels.layouts) == 1
    truth, scale = reference.steer(*widened(args)), reference.steer(*widened(args, magnitude=True))
    assert_within(out, truth, scale, case.width)


@pytest.mark.parametrize("processors", [0, 132])
@pytest.mark.parametrize("width", [64, 47])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_edit_a_row_with_strengths_takes_the_kernels_of_one_edit(
    dtype: torch.dtype, width: int, processors: int, kernels: Kernels
) -> None:
    kernels.processors = processors
    hidden, rows, *tables = SteerCase(21, width, n_edits=3, rank=2, rows="mixed").make(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    strength = torch.randn(21, 1, dtype=wide)
    args = hidden, rows[:, None], strength, *tables, None
    assert_within(native.steer_many(*with_edits(args)), *many_truth(args), width)
    assert set(kernels.layouts) == {ANY if width == 47 else ROW}


# A call with strengths as a layout takes it, or as clusters do.
SCALED = {
    ROW: SteerCase(7, 64, n_edits=3, rank=2, rows="mixed"),
    WIDE: SteerCase(7, 16384, n_edits=2, rank=3, rows="mixed"),
    ANY: SteerCase(7, 47, n_edits=3, rank=2, rows="mixed"),
    None: SteerCase(7, 512, n_edits=3, rank=2, rows="mixed"),
}


def scaled(
    layout: int | None, hidden: Tensor, rows: Tensor, strength: Tensor, tables: list[Tensor], kernels: Kernels
) -> Tensor:
    """What the kernels of this layout make of one edit a row with strengths."""
    op = clusters.steer_many if layout is None else native.steer_many
    out = op(hidden, rows[:, None], strength[:, None], StackedEdits(*tables))
    assert kernels.layouts == ([] if layout is None else [layout]) and all(kernels.sizes)
    return out


@pytest.mark.parametrize("layout", SCALED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strengths_of_any_value_multiply_the_change(
    dtype: torch.dtype, layout: int | None, kernels: Kernels
) -> None:
    case = dataclasses.replace(SCALED[layout], table=torch.float32)
    hidden, rows, *tables = case.make(dtype)
    rows[:] = torch.arange(7) % case.n_edits
    strength = torch.tensor([0.0, -0.0, 1e20, -1e20, float("inf"), float("-inf"), float("nan")])
    out = scaled(layout, hidden, rows, strength, tables, kernels)
    assert torch.equal(out[:2], hidden[:2])
    args = (hidden, rows[:, None], strength[:, None], *tables, None)
    truth, scale = many_truth(tuple(t if t is None else t[2:4] for t in args[:3]) + args[3:])
    assert_within(out[2:4], truth, scale, case.width)
    want = reference.steer_many(*with_edits(args))[4:]
    assert want[:2].isinf().all() and torch.equal(out[4:6], want[:2]) and out[6].isnan().all()


@pytest.mark.parametrize("layout", SCALED)
def test_a_large_strength_of_a_small_change_does_not_overflow(layout: int | None, kernels: Kernels) -> None:
    hidden, rows, bias, left, right = SCALED[layout].make(torch.float32)
    for tensor, value in ((hidden, 0.0), (bias, 0.0), (left, 1e-30), (right, 0.0), (rows, 0)):
        tensor.fill_(value)
    hidden[:, 0], right[:, 0, 0] = 1e20, 1.0
    out = scaled(layout, hidden, rows, torch.full((7,), 1e20), [bias, left, right], kernels)
    torch.testing.assert_close(out[:, 1:], torch.full_like(out[:, 1:], 1e10))
