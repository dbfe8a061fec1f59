"""log(1 − p) and log(p + eps) of log p, and their gradients, against decimal arithmetic of 120 digits."""

from __future__ import annotations

from decimal import Decimal, localcontext

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mechanex.errors import ValidationError
from mechanex.ops.logprob import log1mexp, log_add_eps

EPS = {torch.float32: 2**-23, torch.float64: 2**-52}
LOGS = st.floats(-745.0, -1e-300) | st.floats(-2.0, -1e-6) | st.floats(-40.0, -10.0)


def value_and_gradient(function, x: Tensor) -> tuple[float, float]:  # type: ignore[no-untyped-def]
    leaf = x.detach().requires_grad_()
    out = function(leaf)
    (gradient,) = torch.autograd.grad(out, leaf)
    return out.item(), gradient.item()


def agree(got: float, true: Decimal, dtype: torch.dtype, units: int = 8) -> bool:
    """Within so many units in the last place, or of the smallest number that the type holds in full."""
    tiny = torch.finfo(dtype).tiny
    largest = torch.finfo(dtype).max
    if abs(true) > largest:
        return abs(got) >= largest
    return abs(Decimal(got) - true) <= units * Decimal(EPS[dtype]) * abs(true) + Decimal(tiny)


@given(logp=LOGS, dtype=st.sampled_from(list(EPS)))
@example(logp=-200.0, dtype=torch.float32)
@example(logp=-1e-7, dtype=torch.float32)  # p = 1 − 1e-7
@example(logp=-0.6931471805599453, dtype=torch.float64)
@example(logp=-1e-30, dtype=torch.float32)
@settings(max_examples=300, deadline=None)
def test_log1mexp_and_its_gradient_are_right_to_the_last_digits(logp: float, dtype: torch.dtype) -> None:
    x = torch.tensor(logp, dtype=dtype)
    if x == 0:
        return
    with localcontext() as context:
        # 1 − exp(−1e-300) needs as many digits as p has nines.
        context.prec = 420
        p = Decimal(x.item()).exp()
        value, slope = (1 - p).ln(), -p / (1 - p)
    got, gradient = value_and_gradient(log1mexp, x)
    assert agree(got, value, dtype) and agree(gradient, slope, dtype)


@given(logp=LOGS, eps=st.floats(1e-40, 1.0), dtype=st.sampled_from(list(EPS)))
@example(logp=-200.0, eps=1e-6, dtype=torch.float32)
@example(logp=-200.0, eps=1e-80, dtype=torch.float32)
@example(logp=-1e-7, eps=1e-7, dtype=torch.float32)
@settings(max_examples=300, deadline=None)
def test_log_add_eps_and_its_gradient_are_right(logp: float, eps: float, dtype: torch.dtype) -> None:
    x = torch.tensor(logp, dtype=dtype)
    with localcontext() as context:
        context.prec = 420
        p = Decimal(x.item()).exp()
        value, slope = (p + Decimal(eps)).ln(), p / (p + Decimal(eps))
        # A log that is a sum of two larger ones that cancel is right to a unit of those; the rounding of log eps also
        # moves the gradient by as much.
        unit = Decimal(EPS[dtype]) * 4 * (1 + min(abs(p.ln()), abs(Decimal(eps).ln())))
    got, gradient = value_and_gradient(lambda t: log_add_eps(t, eps), x)
    assert abs(Decimal(got) - value) <= unit + 8 * Decimal(EPS[dtype]) * abs(value)
    with localcontext() as context:
        context.prec = 60
        lost = Decimal(EPS[dtype]) * 8 * (1 + abs(p.ln() - Decimal(eps).ln()) + abs(Decimal(eps).ln()))
        assert abs(Decimal(gradient) - slope) <= lost * slope + Decimal(torch.finfo(dtype).tiny)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_without_eps_nothing_changes(dtype: torch.dtype) -> None:
    x = torch.tensor([-200.0, -1e-7, 0.0, -torch.inf], dtype=dtype, requires_grad=True)
    out = log_add_eps(x, 0.0)
    assert torch.equal(out, x.to(out.dtype))
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0], torch.ones_like(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_are_computed_in_float32(dtype: torch.dtype) -> None:
    x = torch.tensor([-200.0, -8.0, -0.0625, -6e-5], dtype=dtype, requires_grad=True)
    for function in (log1mexp, lambda t: log_add_eps(t, 1e-6)):
        out = function(x)
        wide = x.detach().float().requires_grad_()
        want = function(wide)
        assert out.dtype == torch.float32 and torch.equal(out, want)
        (gradient,), (truth,) = (torch.autograd.grad(o.sum(), i) for o, i in ((out, x), (want, wide)))
        assert gradient.dtype == dtype and torch.equal(gradient, truth.to(dtype))


def test_the_ends_have_finite_gradients() -> None:
    ends = torch.tensor([-torch.inf, 0.0], requires_grad=True)
    out = log1mexp(ends)
    assert out.tolist() == [0.0, -torch.inf]
    assert torch.autograd.grad(out.sum(), ends)[0].tolist() == [0.0, 0.0]
    for function, want in (
        (lambda t: log_add_eps(log1mexp(t), 1e-6), [1.0, 1e-6]),
        (lambda t: log_add_eps(t, 1e-6), [1e-6, 1.0]),
    ):
        out = function(ends)
        torch.testing.assert_close(out.exp(), torch.tensor(want))
        assert torch.autograd.grad(out.sum(), ends)[0].isfinite().all()


def test_what_is_no_probability_is_nan() -> None:
    assert log1mexp(torch.tensor([0.1, torch.nan])).isnan().all()
    assert log_add_eps(torch.tensor(torch.nan), 0.1).isnan()


def test_second_derivatives_and_transforms_exist() -> None:
    x = -torch.rand(6, dtype=torch.float64) * 3 - 0.01
    for function in (log1mexp, lambda t: log_add_eps(t, 0.01)):
        assert torch.autograd.gradcheck(function, x.clone().requires_grad_())
        assert torch.autograd.gradgradcheck(function, x.clone().requires_grad_())
        torch.testing.assert_close(torch.func.vmap(function)(x), function(x))


@pytest.mark.parametrize("eps", [-1e-9, float("nan"), float("inf"), "0", None, True, torch.tensor(0.1)])
def test_an_eps_that_cannot_be_added_is_refused(eps: object) -> None:
    with pytest.raises(ValidationError, match="eps is added to a probability"):
        log_add_eps(torch.zeros(2), eps)  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [[-1.0], torch.tensor([-1])])
def test_only_tensors_of_floats_hold_logs(bad: object) -> None:
    for function in (log1mexp, lambda t: log_add_eps(t, 0.1)):
        with pytest.raises(ValidationError, match="logp must be a floating-point tensor"):
            function(bad)
