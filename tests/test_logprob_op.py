"""The completion_logprob op against the oracle, on every backend that runs here."""

from __future__ import annotations

import numpy as np
import optable
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optable import DTYPES, LOGPROB_CASES, LOGPROB_GRADIENT_CASES, LogprobCase
from tolerances import logprob_bounds
from torch import Tensor

from mechanex import backends
from mechanex.backends import chunked, reference
from mechanex.errors import ValidationError
from mechanex.ops.head import Head
from mechanex.ops.logprob import completion_logprob, log1mexp

HAVE = [b for b in backends.backends() if "completion_logprob" in b.ops]
AVAILABLE = [b.name for b in HAVE if b.lacks("cpu") is None]
FAST = [name for name in AVAILABLE if name != "reference"]
PLACES = [
    pytest.param(b.name, device, id=f"{b.name}-{device}", marks=[pytest.mark.gpu] if device == "cuda" else [])
    for b in HAVE
    for device in (["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
    if b.lacks(device) is None and b.name != "reference"
]


def wide(args: optable.LogprobArgs) -> optable.LogprobArgs:
    """The same arguments in float64."""
    hidden, weight, target, bias, *numbers = args
    return hidden.double(), weight.double(), target, None if bias is None else bias.double(), *numbers


def both(args: optable.LogprobArgs, cotangent: Tensor, backend: str | None) -> tuple[Tensor, Tensor]:
    """Log-probabilities and the gradient for hidden."""
    hidden = args[0].detach().requires_grad_()
    out = completion_logprob(hidden, *args[1:], backend=backend)
    (gradient,) = torch.autograd.grad(out, hidden, cotangent.to(out.dtype))
    return out.detach(), gradient


def assert_matches_oracle(
    case: LogprobCase,
    dtype: torch.dtype,
    backend: str,
    device: str = "cpu",
    multiplies_halves: bool | None = None,
) -> None:
    args = case.make(dtype, device)
    kept = [t.clone() if isinstance(t, Tensor) else t for t in args]
    cotangent = torch.randn(case.n_rows, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(
        device
    )
    truth, d_truth = both(wide(args), cotangent, "reference")
    allowed, d_allowed = logprob_bounds(args, truth, d_truth, cotangent, multiplies_halves=multiplies_halves)
    poison(args)
    alone = completion_logprob(*args, backend=backend)
    out, gradient = both(args, cotangent, backend)
    assert alone.dtype == out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert gradient.dtype == dtype and gradient.shape == args[0].shape
    for got in (alone, out):
        assert_close(got, truth, allowed)
    assert_close(gradient, d_truth, d_allowed)
    for tensor, before in zip(args, kept, strict=True):
        assert not isinstance(tensor, Tensor) or same(tensor, before), "the op wrote to an argument"


def same(tensor: Tensor, other: Tensor) -> bool:
    return torch.equal(tensor.nan_to_num(7.0), other.nan_to_num(7.0))


def assert_close(got: Tensor, truth: Tensor, allowed: Tensor) -> None:
    wrong = ~((got.double() - truth).abs() <= allowed)
    assert not wrong.any(), f"worst {((got.double() - truth).abs() / allowed).max():.3g} times the bound"


def poison(args: optable.LogprobArgs) -> None:
    """Leave NaN behind in memory of the sizes that the op will take."""
    hidden, weight, *_ = args
    for shape in ((hidden.shape[0],), hidden.shape, (hidden.shape[0], weight.shape[0])):
        for dtype in (hidden.dtype, torch.float32):
            [hidden.new_full(shape, torch.nan, dtype=dtype) for _ in range(3)]


@pytest.mark.parametrize(("backend", "device"), PLACES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", LOGPROB_CASES, ids=str)
def test_values_and_gradients_match_the_oracle(
    case: LogprobCase, dtype: torch.dtype, backend: str, device: str
) -> None:
    assert_matches_oracle(case, dtype, backend, device)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_error_is_no_larger_than_that_of_plain_torch(dtype: torch.dtype, backend: str) -> None:
    """Plain torch: logits as the model computes them in this dtype, then a float32 log-softmax."""
    args = LogprobCase(300, 123, 4096).make(dtype)
    hidden, weight, target, *_ = args
    truth, d_truth = both(wide(args), torch.ones(300), "reference")
    out, gradient = both(args, torch.ones(300), backend)
    leaf = hidden.detach().requires_grad_()
    torchs = torch.log_softmax((leaf @ weight.T).float(), 1).gather(1, target.unsqueeze(1)).squeeze(1)
    (d_torchs,) = torch.autograd.grad(torchs.sum(), leaf)

    def error(found: Tensor, true: Tensor) -> float:
        return (found.double() - true).square().mean().sqrt().item()

    assert error(out, truth) <= error(torchs.detach(), truth) + 1e-6
    assert error(gradient, d_truth) <= 1.1 * error(d_torchs, d_truth) + 1e-6
    if dtype == torch.float16:
        assert error(out, truth) < 1e-5, "products of float16 are widened on the CPU"


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("fast", [False, True])
def test_bfloat16_with_and_without_instructions_for_it(
    fast: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked, "_multiplies_bf16", lambda: fast)
    for case in (LogprobCase(47, 123, 1000, True, softcap=5.0), LogprobCase(3, 64, 20000)):
        assert_matches_oracle(case, torch.bfloat16, backend)


def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch, *dtypes: torch.dtype) -> None:
    """Products of half types with float32 sums and results: CUDA's, but for the order of the sums.

    numpy multiplies, so that torch allocates what it does there.
    """

    def widened(tensor: Tensor) -> np.ndarray:
        if tensor.dtype is torch.float16:
            return tensor.numpy().astype(np.float32)
        return (tensor.view(torch.int16).numpy().astype(np.uint32) << 16).view(np.float32)

    def multiply(left: Tensor, right: Tensor, out: Tensor, alpha: float = 1.0, beta: int = 0) -> Tensor:
        found = widened(left) @ widened(right)
        found = torch.from_numpy(np.float32(alpha) * found)
        return out.add_(found) if beta else out.copy_(found)

    monkeypatch.setattr(chunked, "widens", lambda device, dtype: dtype in dtypes)
    monkeypatch.setattr(chunked, "wide_product", multiply)
    monkeypatch.setattr(
        chunked, "add_wide_product", lambda out, left, right, *numbers: multiply(left, right, out, *numbers)
    )


@pytest.fixture
def float16_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    as_on_a_gpu(monkeypatch, torch.float16)


@pytest.mark.usefixtures("float16_as_on_a_gpu")
@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("case", LOGPROB_CASES, ids=str)
def test_float16_multiplied_as_it_is_matches_the_oracle(case: LogprobCase, backend: str) -> None:
    assert_matches_oracle(case, torch.float16, backend, multiplies_halves=True)


@pytest.mark.usefixtures("float16_as_on_a_gpu")
@pytest.mark.parametrize("backend", FAST)
def test_many_small_shares_of_float16_count(backend: str) -> None:
    """40,000 tokens of which none has a share that float16 could hold, and which together move the gradient."""
    weight = torch.zeros(40_000, 4, dtype=torch.float16)
    weight[0, 0], weight[1, 1] = 18.0, 1.0
    weight[2:, 2] = 1.0
    hidden, target = torch.tensor([[1.0, 0, 0, 0]], dtype=torch.float16), torch.tensor([1])
    args = (hidden, weight, target, None, 1.0, None, 1.0)
    _, truth = both(wide(args), torch.ones(1), "reference")
    _, gradient = both(args, torch.ones(1), backend)
    assert abs(truth[0, 2]) > 5e-4
    torch.testing.assert_close(gradient.double(), truth, rtol=2e-3, atol=0.0)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 64 tokens, blocks of two rows."""
    monkeypatch.setattr(chunked, "_ROWS", 2)
    monkeypatch.setattr(chunked, "_LOGITS_CPU", 1)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("case", LOGPROB_GRADIENT_CASES, ids=str)
def test_gradients_agree_with_finite_differences(case: LogprobCase, backend: str) -> None:
    hidden, *rest = case.make(torch.float64)
    assert torch.autograd.gradcheck(
        lambda h: completion_logprob(h, *rest, backend=backend), hidden.requires_grad_()
    )


@given(
    case=st.builds(
        LogprobCase,
        n_rows=st.integers(0, 7),
        width=st.integers(1, 70),
        n_vocab=st.integers(1, 300),
        bias=st.booleans(),
        scale=st.floats(-2, 2),
        softcap=st.none() | st.floats(0.5, 50),
        coldness=st.floats(-3, 3),
        layout=st.sampled_from(["plain", "sliced", "skipping", "transposed", "strided"]),
    ),
    dtype=st.sampled_from(DTYPES),
    backend=st.sampled_from(FAST),
)
@settings(max_examples=80, deadline=None)
def test_any_shape_and_any_number_match_the_oracle(
    case: LogprobCase, dtype: torch.dtype, backend: str
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "_ROWS", 3)
        patch.setattr(chunked, "_LOGITS_CPU", 1)
        assert_matches_oracle(case, dtype, backend)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lead", [-200.0, -30.0, 16.0, 40.0])
def test_digits_survive_where_a_token_is_certain_or_impossible(
    lead: float, dtype: torch.dtype, backend: str
) -> None:
    """The logits are exact in every dtype; the target leads the four others by ``lead``."""
    hidden = torch.tensor([[lead, 1.0]], dtype=dtype)
    weight = torch.tensor([[0.0, 1.0], [1.0, 1.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]], dtype=dtype)
    out, gradient = both((hidden, weight, torch.tensor([1]), None, 1.0, None, 1.0), torch.ones(1), backend)
    # In float64 from the odds themselves; of the gradient only the first direction tells tokens apart.
    odds = torch.tensor([lead], dtype=torch.float64) - torch.tensor(4.0, dtype=torch.float64).log()
    close = {"rtol": 1e-6, "atol": 0.0} if dtype != torch.float64 else {"rtol": 1e-14, "atol": 0.0}
    torch.testing.assert_close(out.double(), torch.nn.functional.logsigmoid(odds), **close)
    close["atol"] = torch.finfo(out.dtype).tiny
    torch.testing.assert_close(log1mexp(out).double(), torch.nn.functional.logsigmoid(-odds), **close)
    last = torch.finfo(dtype)
    close = {"rtol": max(close["rtol"], last.eps), "atol": last.tiny * last.eps}
    torch.testing.assert_close(gradient[:, 0].double(), torch.sigmoid(-odds), **close)


@pytest.mark.parametrize("backend", AVAILABLE)
def test_masked_tokens_count_as_impossible(backend: str) -> None:
    """A bias of −inf, as some models pad their vocabulary."""
    args = LogprobCase(4, 31, 200, bias=True).make(torch.float32)
    hidden, weight, _, bias, *_ = args
    target = torch.tensor([0, 20, 199, 5])
    bias[torch.tensor([5, *range(64, 130)])] = -torch.inf
    left = bias.isfinite()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "_LOGITS_CPU", 1)
        out, gradient = both((hidden, weight, target, bias, 1.0, None, 1.0), torch.ones(4), backend)
    index = left.long().cumsum(0) - 1
    want = completion_logprob(hidden, weight[left], index[target], bias[left], backend="reference")
    torch.testing.assert_close(out[:3], want[:3])
    assert out[3] == -torch.inf and gradient.isfinite().all()


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_is_nan_and_alone(bad: float, backend: str) -> None:
    args = LogprobCase(5, 31, 1000).make(torch.float32)
    clean, d_clean = both(args, torch.ones(5), backend)
    args[0][2, 7] = bad
    out, gradient = both(args, torch.ones(5), backend)
    others = [0, 1, 3, 4]
    assert out[2].isnan() and gradient[2].isnan().any()
    assert torch.equal(out[others], clean[others]) and torch.equal(gradient[others], d_clean[others])


@pytest.mark.parametrize("backend", AVAILABLE)
def test_an_overflowed_logit_is_not_a_certainty(backend: str) -> None:
    hidden, weight = torch.full((1, 2), 3e38), torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    for target in (0, 1):
        assert completion_logprob(hidden, weight, torch.tensor([target]), backend=backend).isnan()


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_twice_the_same_bits(dtype: torch.dtype, backend: str) -> None:
    args = LogprobCase(47, 123, 20000, softcap=30.0).make(dtype)
    first, second = (both(args, torch.ones(47), backend) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    # Without a gradient, one Triton kernel multiplies and reduces: its sums have another order.
    if backend != "triton":
        assert torch.equal(first[0], completion_logprob(*args, backend=backend))


@pytest.mark.parametrize("backend", FAST)
def test_a_row_alone_scores_as_in_company(backend: str) -> None:
    args = LogprobCase(9, 64, 3000, bias=True).make(torch.float32)
    together = completion_logprob(*args, backend=backend)
    alone = torch.cat(
        [completion_logprob(args[0][n : n + 1], args[1], args[2][n : n + 1], *args[3:]) for n in range(9)]
    )
    torch.testing.assert_close(alone, together, rtol=0, atol=float(logprob_bounds(args, together)[0].min()))


@pytest.mark.parametrize("backend", FAST)
def test_threads_change_nothing_but_the_order_of_products(backend: str) -> None:
    args = LogprobCase(70, 64, 9000, bias=True).make(torch.float32)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        shared = both(args, torch.ones(70), backend)
        torch.set_num_threads(1)
        for got, want in zip(both(args, torch.ones(70), backend), shared, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("bad", [-1, 47, 2**40, -(2**63)])
def test_a_target_outside_the_vocabulary_is_refused(bad: int, backend: str) -> None:
    args = LogprobCase(4, 31, 47).make(torch.float32)
    args[2][2] = bad
    with pytest.raises(ValidationError, match=rf"{bad}.*vocabulary holds 47 token"):
        completion_logprob(*args, backend=backend)
    with pytest.raises(ValidationError, match="vocabulary holds 0 token"):
        completion_logprob(args[0], args[1][:0], args[2], backend=backend)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "backend", [b.name for b in HAVE if b.name != "reference" and b.lacks("cuda") is None]
)
def test_a_target_outside_the_vocabulary_gives_nan_on_a_gpu(backend: str) -> None:
    args = LogprobCase(4, 31, 47).make(torch.float32, "cuda")
    args[2][2] = 47
    out, gradient = both(args, torch.ones(4, device="cuda"), backend)
    assert out.isnan().tolist() == [False, False, True, False] and gradient[2].isnan().all()
    assert gradient[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_logits_are_never_alive_at_once(dtype: torch.dtype, backend: str) -> None:
    """Bytes of tensors at their height; the control shows that storing the logits would be seen."""
    n_rows, n_vocab = 300, 40000
    args = LogprobCase(n_rows, 64, n_vocab).make(dtype)
    logits, chunk = n_rows * n_vocab * dtype.itemsize, chunked._LOGITS_CPU * 4
    control = most_bytes(lambda: torch.log_softmax(args[0] @ args[1].T, 1))
    assert control >= 2 * logits
    # A chunk of logits and of widened weights, what the reduction in plain torch makes of it, and a few [N, d].
    allowed = (4 if backend == "native" else 10) * chunk
    assert most_bytes(lambda: completion_logprob(*args, backend=backend)) < allowed < 2 * logits
    assert most_bytes(lambda: both(args, torch.ones(n_rows), backend)) < allowed


def most_bytes(run) -> int:  # type: ignore[no-untyped-def]
    """The most memory that tensors made by ``run`` held at one time."""
    with torch.profiler.profile(profile_memory=True) as seen:
        run()
    held = most = 0
    for event in sorted(seen.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


# Cases with a large vocabulary take most of the time and no branch of their own; the plainest set still runs them.
SMALL = [case for case in LOGPROB_CASES if case.n_rows * case.n_vocab <= 50_000]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set_matches_the_oracle(dtype: torch.dtype, instruction_set: str) -> None:
    for case in LOGPROB_CASES if instruction_set == "generic" else SMALL:
        assert_matches_oracle(case, dtype, "native")


def test_the_oracle_is_the_formula() -> None:
    hidden, weight, target, bias, *_ = LogprobCase(3, 4, 5, bias=True).make(torch.float64)
    logits = 2.0 * (3.0 * torch.tanh(0.5 * (hidden @ weight.T + bias) / 3.0))
    want = torch.log_softmax(logits, 1)[torch.arange(3), target]
    logprob, lse = reference.completion_logprob(hidden, Head(weight, bias, 0.5, 3.0, 2.0), target)
    torch.testing.assert_close(logprob, want)
    torch.testing.assert_close(lse, logits.exp().sum(1).log())
