"""The steer op against the oracle, on every backend that runs here."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import optable
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optable import CASES, DTYPES, GRADIENT_CASES, SteerCase, pairs
from tolerances import assert_within
from torch import Tensor

from mechanex import backends
from mechanex.backends import reference
from mechanex.errors import ValidationError
from mechanex.ops.steer import steer

AVAILABLE = [b.name for b in backends.backends() if "steer" in b.ops and b.lacks("cpu") is None]
FAST = [name for name in AVAILABLE if name != "reference"]
# Each backend on each device that it serves and this machine has.
PLACES = [
    pytest.param(b.name, device, id=f"{b.name}-{device}", marks=[pytest.mark.gpu] if device == "cuda" else [])
    for b in backends.backends()
    for device in (["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
    if "steer" in b.ops and b.lacks(device) is None and b.name != "reference"
]


def widened(args: optable.Args, magnitude: bool = False) -> optable.Args:
    """The same arguments in float64; their absolute values with ``magnitude``."""
    hidden, rows, *tables = args
    wide = [t if t is None else t.double().abs() if magnitude else t.double() for t in (hidden, *tables)]
    return wide[0], rows, wide[1], wide[2], wide[3]


GUARD = 64  # elements before and after a tensor, so that alignment stays what it was


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """New results start as NaN and have a guard before and after them: what was never or wrongly written shows."""
    made: list[tuple[Tensor, Tensor]] = []
    original = torch.empty_like

    def allocate(like: Tensor, **options: object) -> Tensor:
        if type(like) is not Tensor or not like.is_floating_point() or like.is_meta:
            return original(like, **options)
        memory = like.new_full((like.numel() + 2 * GUARD,), float("nan"))
        memory[:GUARD] = memory[-GUARD:] = 7.0
        made.append((memory[:GUARD], memory[-GUARD:]))
        return memory[GUARD:-GUARD].view(like.shape)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty_like", allocate)
        yield
    for before, after in made:
        assert (before == 7.0).all() and (after == 7.0).all(), "the op wrote outside its result"


def poison(tensor: Tensor) -> None:
    """Leave NaN behind in memory of the size that the next result will take."""
    for _ in range(4):
        torch.full_like(tensor, float("nan"), memory_format=torch.contiguous_format)


def assert_matches_oracle(case: SteerCase, dtype: torch.dtype, backend: str, device: str = "cpu") -> None:
    args = case.make(dtype, device)
    before = [None if t is None else t.clone() for t in args]
    with guarded():
        out = steer(*args, backend=backend)
    assert out.dtype == dtype
    assert_within(
        out, reference.steer(*widened(args)), reference.steer(*widened(args, magnitude=True)), case.width
    )
    for tensor, kept in zip(args, before, strict=True):
        assert tensor is None or torch.equal(tensor, kept), "the op wrote to an argument"


@pytest.mark.parametrize(("backend", "device"), PLACES)
@pytest.mark.parametrize(("case", "dtype"), pairs(CASES, DTYPES), ids=str)
def test_matches_the_oracle(case: SteerCase, dtype: torch.dtype, backend: str, device: str) -> None:
    assert_matches_oracle(case, dtype, backend, device)


@pytest.mark.parametrize(("backend", "device"), PLACES)
@pytest.mark.parametrize(("case", "dtype"), pairs(CASES, [torch.float32, torch.bfloat16]), ids=str)
def test_gradients_match_the_oracle(case: SteerCase, dtype: torch.dtype, backend: str, device: str) -> None:
    args = case.make(dtype, device)
    cotangent = torch.randn(args[0].shape, dtype=torch.float64).to(device, dtype)
    ours = gradients(lambda *a: steer(*a, backend=backend), args, cotangent)
    truth = gradients(reference.steer, widened(args), cotangent.double())
    scale = gradients(reference.steer, widened(args, magnitude=True), cotangent.double().abs())
    for name, got, want, size in zip(("hidden", "bias", "left", "right"), ours, truth, scale, strict=True):
        if want is None:
            assert got is None
            continue
        assert got is not None and not got.isnan().any(), f"no gradient for {name}"
        assert_within(got, want, size, max(case.width, case.n_rows))


def gradients(op: Callable[..., Tensor], args: optable.Args, cotangent: Tensor) -> list[Tensor | None]:
    hidden, rows, *tables = args
    leaves = [None if t is None else t.detach().requires_grad_() for t in (hidden, *tables)]
    out = op(leaves[0], rows, leaves[1], leaves[2], leaves[3])
    wanted = [t for t in leaves if t is not None]
    if not out.requires_grad:
        return [None if t is None else torch.zeros_like(t) for t in leaves]
    found = iter(torch.autograd.grad(out, wanted, cotangent, allow_unused=True, materialize_grads=True))
    return [None if t is None else next(found) for t in leaves]


@pytest.mark.ci
@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("case", GRADIENT_CASES, ids=str)
def test_gradients_of_both_orders_agree_with_finite_differences(case: SteerCase, backend: str) -> None:
    hidden, rows, *tables = case.make(torch.float64)
    leaves = [t.detach().requires_grad_() for t in (hidden, *tables) if t is not None]

    def op(hidden: Tensor, bias: Tensor, *pair: Tensor) -> Tensor:
        return steer(hidden, rows, bias, *pair, backend=backend)

    assert torch.autograd.gradcheck(op, leaves)
    assert torch.autograd.gradgradcheck(op, leaves)


@pytest.mark.parametrize("backend", FAST)
def test_each_gradient_may_be_asked_for_alone(backend: str) -> None:
    args = SteerCase(5, 8, n_edits=2, rank=2, rows="mixed").make(torch.float64)
    every = gradients(lambda *a: steer(*a, backend=backend), args, torch.ones(5, 8, dtype=torch.float64))
    for i, want in zip((0, 2, 3, 4), every, strict=True):
        alone = [t if t is None or j != i else t.detach().requires_grad_() for j, t in enumerate(args)]
        steer(*alone, backend=backend).sum().backward()
        torch.testing.assert_close(alone[i].grad, want)


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_without_an_edit_come_back_bit_for_bit(backend: str, dtype: torch.dtype) -> None:
    hidden, rows, *tables = SteerCase(64, 47, n_edits=3, rank=2, rows="mixed").make(dtype)
    hidden[0, :4] = torch.tensor([-0.0, float("inf"), float("-inf"), float("nan")], dtype=dtype)
    rows[0] = -1
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    out = steer(hidden, rows, *tables, backend=backend)
    untouched = rows == -1
    assert 1 < int(untouched.sum()) < 64
    assert torch.equal(out[untouched].view(integer), hidden[untouched].view(integer))
    assert not torch.equal(out, hidden)


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("rank", [0, 1, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_edit_of_zeros_changes_nothing(dtype: torch.dtype, rank: int, backend: str) -> None:
    hidden, _, bias, left, right = SteerCase(9, 123, rank=rank).make(dtype)
    zeros = [None if t is None else torch.zeros_like(t) for t in (bias, left, right)]
    out = steer(hidden, None, *zeros, backend=backend)
    assert torch.equal(out, hidden)
    assert out.data_ptr() != hidden.data_ptr()


@pytest.mark.parametrize("backend", FAST)
def test_the_same_call_gives_the_same_bits(backend: str) -> None:
    args = SteerCase(700, 256, n_edits=3, rank=4, rows="mixed").make(torch.float32)
    assert torch.equal(steer(*args, backend=backend), steer(*args, backend=backend))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_round_to_nearest_even_and_keep_nan(backend: str, dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    shift = torch.tensor(0.00137, dtype=torch.float32)
    for offset in (torch.zeros(()), shift, shift * 1000):
        # One rounding by hand: the float32 sum, then torch's own conversion.
        want = (every.float() + offset).to(dtype)
        bias = offset.expand(1, every.numel()).contiguous()
        got = steer(every[None], None, bias, backend=backend)[0]
        assert torch.equal(got.isnan(), want.isnan())
        assert torch.equal(got.nan_to_num(0.0), want.nan_to_num(0.0))


def test_a_write_outside_the_result_is_caught() -> None:
    with pytest.raises(AssertionError, match="outside its result"), guarded():
        out = torch.empty_like(torch.zeros(3, 4))
        assert out.isnan().all()
        torch.as_strided(out, (1,), (1,), out.storage_offset() + 12).zero_()


def test_a_lazily_negated_view_is_read_as_what_it_stands_for() -> None:
    hidden, rows, *tables = SteerCase(4, 8, n_edits=2, rank=1, rows="mixed").make(torch.float32)
    negated = torch.complex(hidden, -hidden).conj().imag
    assert negated.is_neg()
    torch.testing.assert_close(steer(negated, rows, *tables), steer(hidden, rows, *tables))


@pytest.mark.parametrize("backend", FAST)
def test_leading_dimensions_are_rows(backend: str) -> None:
    hidden, rows, *tables = SteerCase(12, 31, n_edits=2, rank=1, rows="mixed").make(torch.float32)
    flat = steer(hidden, rows, *tables, backend=backend)
    folded = steer(hidden.view(3, 4, 31), rows.view(3, 4), *tables, backend=backend)
    assert torch.equal(folded, flat.view(3, 4, 31))
    assert torch.equal(steer(hidden[0], rows[0], *tables, backend=backend), flat[0])


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("bad", [-2, 3, 2**31 - 1, -(2**31)])
def test_a_row_index_outside_the_table_is_refused(backend: str, bad: int) -> None:
    hidden, rows, *tables = SteerCase(6, 16, n_edits=3, rank=1, rows="mixed").make(torch.float32)
    rows[4] = bad
    with pytest.raises(ValidationError, match=r"3 edit\(s\)"):
        steer(hidden, rows, *tables, backend=backend)


@pytest.mark.gpu
def test_a_row_index_outside_the_table_gives_nan_on_a_gpu() -> None:
    hidden, rows, *tables = SteerCase(6, 16, n_edits=3, rank=1, rows="mixed").make(torch.float32, "cuda")
    rows[4] = 7
    out = steer(hidden, rows, *tables)
    assert out[4].isnan().all() and not out[[0, 1, 2, 3, 5]].isnan().any()


X, B, P = torch.zeros(5, 8), torch.zeros(2, 8), torch.zeros(2, 3, 8)
F8 = torch.float8_e4m3fn
R = torch.zeros(5, dtype=torch.int32)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((X, None, torch.zeros(1, 9)), r"bias must have shape \[K, 8\].*got \[1, 9\]"),
        ((X, None, torch.zeros(8)), r"bias must have shape"),
        ((X, None, B), "without rows the table must hold one edit, got 2"),
        ((X, R[:4], B), r"rows must have shape \[5\], or \[5\] and m edits, got \[4\]"),
        ((X, R.long(), B), "int32 tensor, got torch.int64"),
        ((X, [0] * 5, B), "int32 tensor, got list"),
        ((X, R, B, P), "left and right go together"),
        ((X, R, B, P[:1], P[:1]), r"left must have shape .* got \[1, 3, 8\]"),
        ((X, R, B, P, P[:, :2]), r"right must have left's shape"),
        ((X.int(), R, B), "hidden must be floating point, got torch.int32"),
        ((X, None, B[:1].int()), "bias must be floating point"),
        ((X.int(), None, B[:1].int()), "must be floating point"),
        (
            (X.to(F8), None, B[:1].to(F8)),
            "hidden must be floating point, got torch.float8_e4m3fn: convert it",
        ),
        ((X, None, B[:1].to(F8)), "bias must be floating point, got torch.float8_e4m3fn: convert it"),
        ((X, R, B, P.to(F8), P.to(F8)), "left must be floating point, got torch.float8_e4m3fn: convert it"),
        ((X, R, B.tolist()), "bias must be a tensor, got list"),
        ((X, None, B[:1].to("meta")), "bias is on meta, hidden on cpu"),
        ((X, R.to("meta"), B), "rows is on meta"),
        ((torch.zeros(()), None, B[:1]), "got a scalar"),
    ],
)
def test_bad_arguments_say_what_was_wrong(args: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        steer(*args)  # type: ignore[arg-type]
    with pytest.raises(ValueError):
        steer(*args)  # type: ignore[arg-type]


@pytest.mark.parametrize("case", [SteerCase(4, 6), SteerCase(4, 6, n_edits=2, rank=2, rows="mixed")], ids=str)
def test_the_library_op_passes_opcheck(case: SteerCase) -> None:
    hidden, rows, *tables = case.make(torch.float32)
    leaves = [t if t is None else t.detach().requires_grad_() for t in (hidden, *tables)]
    torch.library.opcheck(torch.ops.mechanex.steer.default, (leaves[0], rows, *leaves[1:], None))


class Steered(torch.nn.Module):
    """A layer that calls the op between two others."""

    def __init__(self, case: SteerCase) -> None:
        super().__init__()
        self.first, self.second = (
            torch.nn.Linear(case.width, case.width),
            torch.nn.Linear(case.width, case.width),
        )
        hidden, rows, bias, left, right = case.make(torch.float32)
        self.hidden, self.rows, self.left, self.right = hidden, rows, left, right
        self.bias = torch.nn.Parameter(bias)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.second(steer(self.first(hidden), self.rows, self.bias, self.left, self.right))


@pytest.mark.slow
@pytest.mark.parametrize("case", [SteerCase(4, 6), SteerCase(4, 6, n_edits=2, rank=2, rows="mixed")], ids=str)
def test_compiles_without_a_graph_break(case: SteerCase) -> None:
    module = Steered(case)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    want, got = module(module.hidden), compiled(module.hidden)
    torch.testing.assert_close(got, want)
    (truth,) = torch.autograd.grad(want.square().sum(), module.bias)
    (grad,) = torch.autograd.grad(got.square().sum(), module.bias)
    torch.testing.assert_close(grad, truth)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("case", [SteerCase(4, 6), SteerCase(4, 6, n_edits=2, rank=2, rows="mixed")], ids=str)
def test_a_trace_of_torch_jit_holds_the_edit(case: SteerCase) -> None:
    hidden, *edit = case.make(torch.float32)
    traced = torch.jit.trace(lambda x: steer(x, *edit), (hidden,))
    other = hidden.flip(0) * 2
    torch.testing.assert_close(traced(other), steer(other, *edit))


def test_fake_and_meta_tensors_get_the_right_shape() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    case = SteerCase(4, 6, n_edits=2, rank=2, rows="mixed")
    with FakeTensorMode() as mode:
        args = [None if t is None else mode.from_tensor(t) for t in case.make(torch.bfloat16)]
        out = steer(*args)
    assert out.shape == (4, 6) and out.dtype == torch.bfloat16
    on_meta = [None if t is None else t.to("meta") for t in case.make(torch.bfloat16)]
    assert steer(*on_meta).shape == (4, 6)


def test_vmap_sees_the_plain_mathematics() -> None:
    hidden, _, bias, left, right = SteerCase(6, 5, rank=2).make(torch.float64)
    batched = torch.func.vmap(lambda h: steer(h, None, bias, left, right))(hidden.view(2, 3, 5))
    torch.testing.assert_close(batched.view(6, 5), steer(hidden, None, bias, left, right))


def test_forward_mode_differentiation_sees_the_plain_mathematics() -> None:
    hidden, rows, bias, left, right = SteerCase(6, 5, n_edits=2, rank=2, rows="mixed").make(torch.float64)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(bias, torch.ones_like(bias))
        _, tangent = torch.autograd.forward_ad.unpack_dual(steer(hidden, rows, dual, left, right))
    torch.testing.assert_close(tangent, (rows >= 0).double()[:, None].expand(6, 5))


@pytest.mark.parametrize("backend", FAST)
def test_autocast_does_not_lower_the_arithmetic(backend: str) -> None:
    args = SteerCase(5, 64, n_edits=2, rank=3, rows="mixed").make(torch.float32)
    want = steer(*args, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(steer(*args, backend=backend), want)


@given(
    n_rows=st.integers(0, 9),
    width=st.integers(1, 70),
    n_edits=st.integers(1, 5),
    rank=st.integers(0, 9),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["plain", "sliced", "skipping", "offset", "transposed"]),
    backend=st.sampled_from(FAST),
)
@settings(max_examples=60, deadline=None)
def test_any_shape_matches_the_oracle(
    n_rows: int, width: int, n_edits: int, rank: int, dtype: torch.dtype, layout: str, backend: str
) -> None:
    assert_matches_oracle(SteerCase(n_rows, width, n_edits, rank, "mixed", layout), dtype, backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set_matches_the_oracle(dtype: torch.dtype, instruction_set: str) -> None:
    for case in CASES:
        assert_matches_oracle(case, dtype, "native")


@pytest.mark.skipif("native" not in AVAILABLE, reason="no native module")
@pytest.mark.parametrize("rank", [0, 1, 4, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [47, 123, 256])
def test_a_row_comes_out_the_same_whatever_its_neighbours_are(
    rank: int, dtype: torch.dtype, width: int
) -> None:
    """Bit for bit: a request that is batched with others must not notice them."""
    hidden = torch.randn(13, width).to(dtype)
    rows = torch.tensor([0, 0, 0, 0, 0, 1, 1, -1, 0, 1, 1, 1, 1], dtype=torch.int32)
    bias, left, right = torch.randn(2, width), torch.randn(2, rank, width), torch.randn(2, rank, width)
    tables = (bias, left, right) if rank else (bias,)
    together = steer(hidden, rows, *tables, backend="native")
    for t in range(13):
        assert torch.equal(
            steer(hidden[t : t + 1], rows[t : t + 1], *tables, backend="native")[0], together[t]
        )
