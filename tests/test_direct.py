"""The steer op on torch's tensors themselves, by the CPU's compiled module."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from optable import CASES, DTYPES, SteerCase
from test_steer_op import widened
from tolerances import assert_within
from torch import Tensor

from mechanex import backends
from mechanex.backends import native, reference
from mechanex.errors import ValidationError
from mechanex.ops.steer import steer

pytestmark = pytest.mark.skipif(
    native.missing() is not None or native.direct("cpu") is None,
    reason="needs mechanex._native and torch 2.10",
)


@pytest.fixture
def door() -> Callable[..., Tensor | None]:
    found = native.direct("cpu")
    assert found is not None
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_gives_what_the_oracle_does_or_leaves_the_call(
    case: SteerCase, dtype: torch.dtype, door: Callable[..., Tensor | None]
) -> None:
    hidden, *_ = args = case.make(dtype)
    out = door(*args, None)
    wide = torch.promote_types(dtype, torch.float32)
    if case.layout not in ("plain", "offset") or hidden.numel() == 0 or (case.table or dtype) is not wide:
        assert out is None
        return
    assert out is not None and out.shape == hidden.shape and out.dtype is dtype and out.is_contiguous()
    assert_within(
        out, reference.steer(*widened(args)), reference.steer(*widened(args, magnitude=True)), case.width
    )


def test_whatever_is_not_plain_is_left_and_told_of(door: Callable[..., Tensor | None]) -> None:
    hidden, rows, bias, left, right = SteerCase(5, 64, n_edits=3, rank=2, rows="mixed").make(torch.float32)
    outside = rows.clone()
    outside[3] = 3
    for args in (
        (hidden, None, bias, left, right),
        (hidden, outside, bias, left, right),
        (hidden, rows[:4], bias, left, right),
        (hidden, rows.long(), bias, left, right),
        (hidden, rows, bias, left, None),
        (hidden, rows, bias.tolist(), left, right),
        (hidden.to("meta"), rows, bias, left, right),
    ):
        assert door(*args, None) is None
        with pytest.raises(ValidationError):
            steer(*args, backend="native")
    strength = torch.ones(5)
    assert door(hidden, rows, bias, left, right, strength) is None
    torch.testing.assert_close(
        steer(hidden, rows, bias, left, right, strength=strength), steer(hidden, rows, bias, left, right)
    )
    for negated in (torch._neg_view(hidden), torch._neg_view(left), torch._neg_view(bias)):
        args = [negated if t.shape == negated.shape else t for t in (hidden, rows, bias, left, right)]
        assert door(*args, None) is None


def test_the_op_takes_it_for_plain_calls_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = native.direct("cpu")

    def counted(*args: Tensor | None) -> Tensor | None:
        out = real(*args)
        calls.append(out is not None)
        return out

    monkeypatch.setattr(native, "direct", lambda device: counted if device == "cpu" else None)
    hidden, rows, bias, left, right = args = SteerCase(5, 64, n_edits=3, rank=2, rows="mixed").make(
        torch.float32
    )
    expected = steer(*args, backend="eager")
    assert not calls
    for name in ("auto", "native", None):
        torch.testing.assert_close(steer(*args, backend=name), expected, rtol=1e-5, atol=1e-5)
    assert calls == [True] * 3
    x = hidden.clone().requires_grad_()
    assert steer(x, rows, bias, left, right).requires_grad
    torch.func.vmap(lambda h: steer(h, None, bias[:1], left[:1], right[:1]))(hidden[:, None])
    assert len(calls) == 3
    with torch.no_grad():
        assert not steer(x, rows, bias, left, right).requires_grad
    assert calls == [True] * 4


def test_one_large_edit_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(1, 1 << 15)
    for rank, taken in ((1, True), (4, True), (5, False)):
        left = torch.zeros(1, rank, x.shape[1])
        assert (backends.direct_steer("auto", x, None, left) is not None) == taken
        assert backends.direct_steer("native", x, None, left) is not None
        assert backends.direct_steer("eager", x, None, left) is None
    for rank, taken in ((native.TORCH_RANK, True), (native.TORCH_RANK + 1, False)):
        assert (backends.direct_steer("auto", x, None, torch.zeros(1, rank, 64)) is not None) == taken
