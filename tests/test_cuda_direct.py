"""The steer op on torch's tensors themselves: the CUDA kernels' compiled door, on the CPU's tensors and threads."""

from __future__ import annotations

import importlib.util
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kernels_on_host import CAN_BUILD, WHY_NOT, built
from optable import CASES, DTYPES, SteerCase
from test_steer_op import widened
from tolerances import assert_within, many_truth

from mechanex import backends
from mechanex._private.torch import exchange_table
from mechanex.backends import native, reference
from mechanex.errors import ValidationError
from mechanex.ops.gate import Gate
from mechanex.ops.steer import steer

HEADERS = Path(sysconfig.get_path("include"))

pytestmark = [
    pytest.mark.ci,
    pytest.mark.skipif(
        not CAN_BUILD or not (HEADERS / "Python.h").exists() or exchange_table() is None,
        reason=f"{WHY_NOT}, Python's headers and torch 2.10",
    ),
]


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The compiled module, with kernels that run on the CPU."""
    library = built(tmp_path_factory, "direct", "direct_on_host", "-I", str(HEADERS))
    spec = importlib.util.spec_from_file_location("direct_on_host", library)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.direct_setup(exchange_table(), torch.Tensor, torch.nn.Parameter, torch.empty_like)
    return module


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_gives_what_the_oracle_does_or_leaves_the_call(
    case: SteerCase, dtype: torch.dtype, door: Any
) -> None:
    hidden, _rows, *_tables = args = case.make(dtype)
    out = door.steer_direct(*args, None)
    converted = case.table is not None and case.table is not dtype
    half = dtype in (torch.bfloat16, torch.float16) and case.table is torch.float32
    apart = case.layout not in ("plain", "offset") or hidden.numel() == 0
    if apart or (converted and not half):
        assert out is None
        return
    assert_within(
        out, reference.steer(*widened(args)), reference.steer(*widened(args, magnitude=True)), case.width
    )
    assert out.shape == hidden.shape and out.dtype is dtype and out.is_contiguous()


def test_leading_dimensions_are_rows(door: Any) -> None:
    hidden, rows, *tables = SteerCase(12, 64, n_edits=3, rank=2, rows="mixed").make(torch.float32)
    out = door.steer_direct(hidden.view(3, 4, 64), rows.view(3, 4), *tables, None)
    assert torch.equal(out, door.steer_direct(hidden, rows, *tables, None).view(3, 4, 64))
    one = door.steer_direct(hidden[0], None, *(t[:1] for t in tables), None)
    assert one.shape == (64,)


def test_whatever_is_not_plain_is_left(door: Any) -> None:
    hidden, rows, bias, left, right = SteerCase(5, 64, n_edits=3, rank=2, rows="mixed").make(torch.float32)
    for args in (
        (hidden, rows, bias, left, None),
        (hidden, None, bias, left, right),  # a table of three without rows
        (hidden, rows[:4], bias, left, right),
        (hidden, rows.long(), bias, left, right),
        (hidden, rows[:, None], bias, left, right),
        (hidden, rows, bias[:, :63], left, right),
        (hidden, rows, bias[:2], left, right),
        (hidden, rows, bias, left, right[:, :1]),
        (hidden, rows, bias, left.double(), right),
        (hidden, rows, bias, left[:, :0], right[:, :0]),
        (hidden.int(), rows, bias, left, right),
        (torch._neg_view(hidden), rows, bias, left, right),
        (hidden, rows, bias, torch._neg_view(left), right),
        (hidden.to("meta"), rows, bias, left, right),
        (hidden, rows.tolist(), bias, left, right),
        (hidden, rows, None, left, right),
        (hidden.as_subclass(Marked), rows, bias, left, right),
        (hidden, rows, bias),
    ):
        assert door.steer_direct(*args, None) is None
    assert door.steer_direct(torch.nn.Parameter(hidden), rows, bias, left, right, None) is not None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strengths_go_through_the_door(dtype: torch.dtype, door: Any, calls: Callable[[], int]) -> None:
    wide = torch.promote_types(dtype, torch.float32)
    case = SteerCase(6, 64, n_edits=3, rank=2, rows="mixed", table=wide)
    hidden, rows, *tables = case.make(dtype)
    strength = torch.randn(6, dtype=wide)
    args = (hidden, rows[:, None], strength[:, None], *tables, None)
    shaped = steer(hidden.view(2, 3, 64), rows.view(2, 3), *tables, strength=strength.view(2, 3))
    assert calls() == 1
    assert_within(shaped.view(6, 64), *many_truth(args), 64)
    assert torch.equal(door.steer_direct(hidden, rows, *tables, strength), shaped.view(6, 64))
    for other in (
        strength[:5],
        strength[:, None],
        strength.to(torch.float16),
        torch._neg_view(strength),
        1.0,
    ):
        assert door.steer_direct(hidden, rows, *tables, other) is None


class Marked(torch.Tensor):
    """A tensor of a type of its own."""


@pytest.fixture
def calls(door: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Makes the CPU look like a GPU to the op; how many calls have gone through the door."""
    monkeypatch.setattr(backends, "_is_on_gpu", lambda tensor: True)
    monkeypatch.setattr(native, "direct", lambda device: door.steer_direct)
    before = door.launched()
    return lambda: int(door.launched() - before)


def test_the_op_goes_through_the_door_where_it_may(calls: Callable[[], int]) -> None:
    args = SteerCase(5, 64, n_edits=3, rank=2, rows="mixed").make(torch.float32)
    expected = steer(*args, backend="eager")
    assert calls() == 0
    for name in ("auto", "native"):
        assert_close(steer(*args, backend=name), expected)
    assert calls() == 2
    with backends.use("native"):
        assert_close(steer(*args), expected)
    assert calls() == 3


def test_gradients_transforms_and_other_arguments_take_the_usual_way(calls: Callable[[], int]) -> None:
    hidden, rows, bias, left, right = SteerCase(5, 64, n_edits=3, rank=2, rows="mixed").make(torch.float32)
    x = hidden.clone().requires_grad_()
    assert steer(x, rows, bias, left, right).requires_grad
    torch.func.vmap(lambda h: steer(h, None, bias[:1], left[:1], right[:1]))(hidden[:, None])
    strength = torch.ones(5, requires_grad=True)
    assert steer(hidden, rows, bias, left, right, strength=strength).requires_grad
    steer(hidden, rows, bias, left, right, gate=Gate.stack([Gate.of("step", row) for row in bias]))
    steer(hidden.T.contiguous().T, rows, bias, left, right)
    assert calls() == 0
    with torch.no_grad():
        steer(x, rows, bias, left, right)
    assert calls() == 1
    with pytest.raises(ValidationError, match="rows must have shape"):
        steer(hidden, rows[:4], bias, left, right)
    with pytest.raises(ValidationError, match="left must be a tensor"):
        steer(hidden, rows, bias, left.tolist(), right)


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("n_rows", "rank", "by_row", "dtype", "quicker"),
    [
        (16, 1, False, torch.bfloat16, True),
        (1 << 17, 0, True, torch.bfloat16, True),
        (1 << 17, 1, False, torch.bfloat16, True),
        (1 << 19, 1, False, torch.bfloat16, False),
        (1 << 17, 1, False, torch.float32, False),
        (1 << 17, 1, True, torch.bfloat16, True),
        (1 << 17, 4, False, torch.bfloat16, True),
        (1 << 17, 4, False, torch.float32, False),
    ],
)
def test_large_calls_are_left_to_triton_where_it_is_the_quicker(
    n_rows: int, rank: int, by_row: bool, dtype: torch.dtype, quicker: bool, calls: Callable[[], int]
) -> None:
    hidden = torch.empty(1, dtype=dtype).expand(n_rows, 64)
    rows = torch.zeros(1, dtype=torch.int32).expand(n_rows) if by_row else None
    left = torch.zeros(1, rank, 64) if rank else None
    assert (backends.direct_steer("auto", hidden, rows, left) is not None) == quicker
    assert backends.direct_steer("native", hidden, rows, left) is not None
    assert backends.direct_steer("triton", hidden, rows, left) is None
    # With strengths triton is the quicker one beyond the bound, whatever the edit.
    strength = torch.ones(1).expand(n_rows)
    small = hidden.numel() <= backends.LAUNCH_BOUND
    assert (backends.direct_steer("auto", hidden, rows, left, strength) is not None) == small
    assert backends.direct_steer("native", hidden, rows, left, strength) is not None
