"""The completion_logprob op as it is called: arguments, compilers, transforms, gradients that do not exist."""

from __future__ import annotations

import pytest
import torch
from optable import LogprobCase
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mechanex import backends
from mechanex.backends import native
from mechanex.errors import MechanexError, ValidationError
from mechanex.ops.logprob import completion_logprob

CASE = LogprobCase(5, 8, 200, True, 0.5, 4.0, 2.0)
H, W, T, B, *NUMBERS = CASE.make(torch.float32)
FAST = [
    b.name
    for b in backends.backends()
    if "completion_logprob" in b.ops and b.lacks("cpu") is None and b.name != "reference"
]


def score(hidden: Tensor, **options: str) -> Tensor:
    return completion_logprob(hidden, W, T, B, *NUMBERS, **options)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (([[0.0]], W, T), "hidden must be a tensor, got list"),
        ((H, W.tolist(), T), "weight must be a tensor, got list"),
        ((H, W, T.tolist()), "target must be a tensor, got list"),
        ((H, W, None), "target must be a tensor, got NoneType"),
        ((H.int(), W.int(), T), "hidden must be float32, bfloat16, float16 or float64, got torch.int32"),
        ((H[0, 0], W, T), "got a scalar"),
        ((H, W[:, :7], T), r"weight must have shape \[V, 8\] .*got \[200, 7\]"),
        ((H, W[0], T), r"weight must have shape \[V, 8\]"),
        ((H, W.half(), T), r"weight must have hidden's dtype torch.float32, got torch.float16: convert"),
        ((H, W, T.int()), r"target must be an int64 tensor, got torch.int32: use target.long\(\)"),
        ((H, W, T[:4]), r"target must have shape \[5\], got \[4\]"),
        ((H, W, T, B[:7]), r"bias must have shape \[V\] = \[200\], got \[7\]"),
        ((H, W, T, B.long()), "bias must be floating point, got torch.int64"),
        ((H, W, T, B.to(torch.float8_e5m2)), "got torch.float8_e5m2: convert it to float32"),
        ((H, W.to("meta"), T), "weight is on meta, hidden on cpu"),
        ((H, W, T, B, float("nan")), "scale must be a finite number, got nan"),
        ((H, W, T, B, torch.ones(())), "scale must be a finite number, got tensor"),
        ((H, W, T, B, "1"), "scale must be a finite number, got '1'"),
        ((H, W, T, B, 1.0, 0.0), "softcap must be a positive number or None, got 0.0"),
        ((H, W, T, B, 1.0, -3), "softcap must be a positive number or None, got -3"),
        ((H, W, T, B, 1.0, None, float("inf")), "coldness must be a finite number, got inf"),
        ((H, W, T, B, 1.0, None, None), "coldness must be a finite number, got None"),
    ],
)
def test_bad_arguments_say_what_was_wrong(args: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        completion_logprob(*args)  # type: ignore[arg-type]


def test_leading_dimensions_are_rows() -> None:
    hidden, weight, target, *_ = LogprobCase(12, 31, 47).make(torch.float32)
    flat = completion_logprob(hidden, weight, target)
    assert torch.equal(completion_logprob(hidden.view(3, 4, 31), weight, target.view(3, 4)), flat.view(3, 4))
    one = completion_logprob(hidden[0], weight, target[0])
    assert one.shape == ()
    torch.testing.assert_close(one, flat[0])
    assert completion_logprob(hidden[:0].view(2, 0, 31), weight, target[:0].view(2, 0)).shape == (2, 0)


def test_whole_numbers_are_numbers() -> None:
    assert torch.equal(
        completion_logprob(H, W, T, None, 2, 4, 3), completion_logprob(H, W, T, None, 2.0, 4.0, 3.0)
    )


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_a_gradient_that_would_be_missing_is_an_error(frozen: str) -> None:
    weight, bias = W.clone(), B.clone()
    (weight if frozen == "weight" else bias).requires_grad_()
    with pytest.raises(ValidationError, match=r"unembedding requires a gradient.*requires_grad_\(False\)"):
        completion_logprob(H, weight, T, bias)
    with torch.no_grad():
        assert not completion_logprob(H, weight, T, bias).requires_grad
    assert not completion_logprob(H, weight.detach(), T, bias.detach()).requires_grad


def test_gradients_flow_to_hidden_only_when_asked() -> None:
    leaf = H.clone().requires_grad_()
    assert score(leaf).requires_grad and not score(H).requires_grad
    with torch.no_grad():
        assert not score(leaf).requires_grad
    with torch.inference_mode():
        torch.testing.assert_close(score(H), score(leaf).detach())
    out = score(torch.nn.Parameter(H))
    assert out.requires_grad


@pytest.mark.parametrize("way", ["eager", "library"])
@pytest.mark.parametrize("backend", FAST)
def test_a_second_derivative_is_an_error(way: str, backend: str) -> None:
    leaf = H.clone().requires_grad_()
    if way == "eager":
        out = score(leaf, backend=backend)
    else:
        out = torch.ops.mechanex.completion_logprob(leaf, W, T, B, *NUMBERS, backend)[0]
    (first,) = torch.autograd.grad(out.sum(), leaf, create_graph=True)
    message = "differentiable once" if way == "eager" else "no autograd formula"
    with pytest.raises((MechanexError, RuntimeError), match=message):
        torch.autograd.grad(first.sum(), leaf)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_the_library_ops_pass_opcheck(requires_grad: bool) -> None:
    leaf = H.clone().requires_grad_(requires_grad)
    torch.library.opcheck(torch.ops.mechanex.completion_logprob.default, (leaf, W, T, B, *NUMBERS, None))
    grad, lse = torch.randn(5), torch.randn(5)
    args = (grad, H, W, T, B, lse, *NUMBERS, None)
    torch.library.opcheck(torch.ops.mechanex.completion_logprob_backward.default, args)


def test_the_library_op_computes_what_the_function_does() -> None:
    leaf = H.clone().requires_grad_()
    want = score(leaf)
    (gradient,) = torch.autograd.grad(want.sum(), leaf)
    for backend in ("reference", *FAST):
        got = torch.ops.mechanex.completion_logprob(leaf, W, T, B, *NUMBERS, backend)[0]
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(torch.autograd.grad(got.sum(), leaf)[0], gradient)


def test_only_the_log_probability_of_the_library_op_is_differentiable() -> None:
    leaf = H.clone().requires_grad_()
    logprob, lse = torch.ops.mechanex.completion_logprob(leaf, W, T, B, *NUMBERS, None)
    assert logprob.requires_grad and not lse.requires_grad


class Scorer(torch.nn.Module):
    """A layer before the op."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(8, 8)

    def forward(self, hidden: Tensor, coldness: float = 2.0) -> Tensor:
        return completion_logprob(self.first(hidden), W, T, B, 0.5, 4.0, coldness)


@pytest.mark.slow
def test_compiles_without_a_graph_break() -> None:
    module = Scorer()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for coldness in (2.0, 3.0, 0.5):
        want, got = module(H, coldness), compiled(H, coldness)
        torch.testing.assert_close(got, want)
        (truth,) = torch.autograd.grad(want.square().sum(), module.first.weight)
        (grad,) = torch.autograd.grad(got.square().sum(), module.first.weight)
        torch.testing.assert_close(grad, truth)


@pytest.mark.slow
def test_exports() -> None:
    module = Scorer()
    exported = torch.export.export(module, (H,)).module()
    torch.testing.assert_close(exported(H), module(H))


def test_fake_and_meta_tensors_get_the_right_shape() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        fake = completion_logprob(mode.from_tensor(H), mode.from_tensor(W), mode.from_tensor(T))
    assert fake.shape == (5,) and fake.dtype == torch.float32
    assert (
        completion_logprob(H.double().to("meta"), W.double().to("meta"), T.to("meta")).dtype == torch.float64
    )


def test_a_dispatch_mode_sees_one_op() -> None:
    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    names: list[str] = []
    want = score(H)
    with Seen():
        got = score(H)
    torch.testing.assert_close(got, want)
    assert names == ["mechanex.completion_logprob.default"]


def test_transforms_see_the_plain_mathematics() -> None:
    hidden, weight, target, bias, *numbers = CASE.make(torch.float64)

    def one(h: Tensor, t: Tensor) -> Tensor:
        return completion_logprob(h, weight, t, bias, *numbers)

    leaf = hidden.clone().requires_grad_()
    want = one(leaf, target)
    (gradient,) = torch.autograd.grad(want.sum(), leaf)
    torch.testing.assert_close(torch.func.vmap(one)(hidden, target), want)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(one))(hidden, target), gradient)
    second = torch.func.hessian(lambda h: one(h, target[0]))(hidden[0])
    assert second.shape == (8, 8) and second.abs().max() > 0
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(hidden, torch.ones_like(hidden))
        tangent = torch.autograd.forward_ad.unpack_dual(one(dual, target)).tangent
    torch.testing.assert_close(tangent, gradient.sum(1))


@pytest.mark.parametrize("backend", FAST)
def test_autocast_does_not_lower_the_arithmetic(backend: str) -> None:
    leaf = H.clone().requires_grad_()
    want = score(leaf, backend=backend)
    (truth,) = torch.autograd.grad(want.sum(), leaf)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = score(leaf, backend=backend)
        assert torch.equal(got, want)
    assert torch.equal(torch.autograd.grad(got.sum(), leaf)[0], truth)


def test_conjugated_and_negated_views_are_what_they_stand_for() -> None:
    negated = [torch.complex(t, -t).conj().imag for t in (H, W, B)]
    assert all(t.is_neg() for t in negated)
    torch.testing.assert_close(
        completion_logprob(negated[0], negated[1], T, negated[2]), completion_logprob(H, W, T, B)
    )


@pytest.mark.skipif(native.missing() is not None, reason="no native module")
def test_auto_takes_native_on_the_cpu_and_native_serves_nothing_else() -> None:
    chosen = backends.select("completion_logprob", "auto", H, W, T, B, *NUMBERS)
    assert chosen is backends.get("native").ops["completion_logprob"]
    assert "completion_logprob" in backends.selection()


def test_a_backend_may_leave_out_the_slope(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then its gradients come from what it saved."""
    eager = backends.get("eager")
    whole = eager.ops["completion_logprob"]
    leaf = H.clone().requires_grad_()
    (want,) = torch.autograd.grad(score(leaf, backend="eager").sum(), leaf)
    monkeypatch.setitem(
        eager.ops, "completion_logprob", backends.Kernel(whole.run, gradients=whole.gradients)
    )
    (got,) = torch.autograd.grad(score(leaf, backend="eager").sum(), leaf)
    torch.testing.assert_close(got, want)
