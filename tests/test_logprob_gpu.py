"""What only a GPU can show of completion_logprob: real sizes, memory, streams, graphs, no waiting; else skipped."""

from __future__ import annotations

import pytest
import torch
from optable import DTYPES, LogprobArgs, LogprobCase, with_head
from test_logprob_op import assert_close, both
from tolerances import logprob_bounds
from torch import Tensor

from mechanex import backends
from mechanex.backends import arithmetic, chunked, triton
from mechanex.backends.native import modules
from mechanex.errors import ValidationError
from mechanex.ops.logprob import completion_logprob

HAS_GPU = torch.cuda.is_available()
NAMES = [
    b.name
    for b in backends.backends()
    if HAS_GPU and "completion_logprob" in b.ops and b.lacks("cuda") is None
]
FAST = [name for name in NAMES if name != "reference"] or ["none"]
NEEDS_NATIVE = pytest.mark.skipif("native" not in FAST, reason="no CUDA module")

pytestmark = pytest.mark.gpu

# One row and a real vocabulary; tens of rows; every number; odd sizes that no wide access can serve; several blocks
# of rows; weights with adjacent tokens.
LARGE = (
    LogprobCase(1, 4096, 32000),
    LogprobCase(16, 2304, 50000, softcap=30.0),
    LogprobCase(48, 1024, 50257, True, 0.5, None, 1.7),
    LogprobCase(257, 1023, 32003, True),
    LogprobCase(2100, 512, 32768, softcap=20.0, coldness=0.3),
    LogprobCase(300, 768, 50257, layout="transposed"),
)


def device_args(case: LogprobCase, dtype: torch.dtype) -> LogprobArgs:
    """The case drawn on the device: the table's own draws would take the CPU seconds."""
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda", dtype=dtype)

    weight = draw(case.n_vocab, case.width).mul_(3 / case.width**0.5)
    if case.layout == "transposed":
        weight = weight.T.contiguous().T
    target = torch.randint(0, case.n_vocab, (case.n_rows,), generator=generator, device="cuda")
    bias = draw(case.n_vocab) if case.bias else None
    return draw(case.n_rows, case.width), weight, target, bias, case.scale, case.softcap, case.coldness


def oracle(args: LogprobArgs, rows: slice = slice(None)) -> tuple[Tensor, LogprobArgs]:
    """Log-probabilities of some rows in float64, on the GPU; and the arguments of those rows."""
    hidden, weight, target, bias, scale, softcap, coldness = args
    few = (hidden[rows], weight, target[rows], bias, scale, softcap, coldness)
    z = torch.cat([hidden[rows].double() @ part.double().T for part in weight.split(1 << 15)], 1)
    z = scale * (z if bias is None else z + bias.double())
    z = coldness * (z if softcap is None else softcap * torch.tanh(z / softcap))
    return torch.log_softmax(z, 1).gather(1, few[2].unsqueeze(1)).squeeze(1), few


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_large_shapes_match_the_oracle(case: LogprobCase, dtype: torch.dtype, backend: str) -> None:
    args = device_args(case, dtype)
    rows = slice(None, None, max(1, case.n_rows // 64))
    leaf = args[0].clone().requires_grad_()
    truth, few = oracle((leaf, *args[1:]), rows)
    cotangent = torch.randn(case.n_rows, device="cuda")
    (d_truth,) = torch.autograd.grad(truth, leaf, cotangent[rows].double())
    truth, few = truth.detach(), (few[0].detach(), *few[1:])
    allowed, d_allowed = logprob_bounds(few, truth, d_truth[rows].double(), cotangent[rows])
    # The truth's gradient came back in the dtype that is judged.
    d_allowed = d_allowed + torch.finfo(dtype).eps * d_truth[rows].double().abs()
    assert_close(completion_logprob(*args, backend=backend)[rows], truth, allowed)
    out, gradient = both(args, cotangent, backend)
    assert_close(out[rows], truth, allowed)
    assert_close(gradient[rows], d_truth[rows].double(), d_allowed)


@pytest.mark.skipif("triton" not in FAST, reason="no Triton")
def test_tiles_that_are_to_be_measured_match_the_oracle() -> None:
    """Those that fit the chip; what they ask for, and what it has, the compiler says."""
    from triton.runtime.errors import OutOfResources

    kernels = triton._kernel("logprob")
    args = device_args(LogprobCase(300, 1023, 50257, True, softcap=20.0), torch.bfloat16)
    truth, few = oracle(args)
    allowed, _ = logprob_bounds(few, truth)
    for tile in kernels.CANDIDATES:
        try:
            out, _ = kernels.logprob(*with_head(args), tile=tile)
        except OutOfResources:
            continue
        assert_close(out, truth, allowed)
        assert torch.equal(kernels.logprob(*with_head(args), tile=tile)[0], out)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_keep_what_their_products_sum_to(dtype: torch.dtype, backend: str) -> None:
    """Logits rounded to a half type would be off by hundreds of times this."""
    if not arithmetic.widens(torch.device("cuda", 0), dtype):
        pytest.skip("this torch gives products of half types in their own type")
    args = device_args(LogprobCase(64, 1024, 32000), dtype)
    truth, _ = oracle(args)
    for out in (
        completion_logprob(*args, backend=backend),
        both(args, torch.ones(64, device="cuda"), backend)[0],
    ):
        assert (out.double() - truth).abs().max() < 5e-5


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("n_rows", "width"), [(16, 4096), (64, 4096), (1030, 4096), (4096, 1024)])
def test_the_logits_are_never_stored(n_rows: int, width: int, dtype: torch.dtype, backend: str) -> None:
    n_vocab = 1 << 17
    hidden, weight, target, *rest = device_args(LogprobCase(n_rows, width, n_vocab), dtype)
    hidden.requires_grad_()

    def extra(run) -> int:  # type: ignore[no-untyped-def]
        run()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def score() -> None:
        with torch.no_grad():
            completion_logprob(hidden, weight, target, *rest, backend=backend)

    def learn() -> None:
        out = completion_logprob(hidden, weight, target, *rest, backend=backend)
        torch.autograd.grad(out.sum(), hidden)

    numbers = n_rows * 4
    assert extra(score) <= chunked.MOST_BYTES + numbers
    assert extra(learn) <= chunked.MOST_BYTES + numbers + hidden.nbytes
    if backend == "triton" and dtype == torch.bfloat16:
        assert extra(score) < 2**23


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bad_targets_give_nan_and_touch_no_other_row(dtype: torch.dtype, backend: str) -> None:
    hidden, weight, target, *rest = device_args(LogprobCase(70, 64, 5000, True, softcap=9.0), dtype)
    ones = torch.ones(70, device="cuda")
    want = (
        completion_logprob(hidden, weight, target, *rest, backend=backend),
        *both((hidden, weight, target, *rest), ones, backend),
    )
    target = target.clone()
    target[5:9] = torch.tensor([-1, 5000, 2**40 + 3, -(2**62)])
    inside = torch.ones(70, dtype=torch.bool, device="cuda")
    inside[5:9] = False
    got = (
        completion_logprob(hidden, weight, target, *rest, backend=backend),
        *both((hidden, weight, target, *rest), ones, backend),
    )
    for ours, good in zip(got, want, strict=True):
        assert ours[~inside].isnan().all()
        assert torch.equal(ours[inside], good[inside])


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("n_rows", [3, 70, 1500])
def test_the_same_call_gives_the_same_bits(n_rows: int, backend: str) -> None:
    args = device_args(LogprobCase(n_rows, 1024, 50257, softcap=30.0), torch.bfloat16)
    ones = torch.ones(n_rows, device="cuda")
    alone, first = completion_logprob(*args, backend=backend), both(args, ones, backend)
    for _ in range(4):
        assert torch.equal(completion_logprob(*args, backend=backend), alone)
        for one, other in zip(both(args, ones, backend), first, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_call_does_not_wait_for_the_device(dtype: torch.dtype, backend: str) -> None:
    args = device_args(LogprobCase(64, 512, 32000, True, softcap=5.0), dtype)
    ones = torch.ones(64, device="cuda")
    both(args, ones, backend), completion_logprob(*args, backend=backend)
    torch.cuda.set_sync_debug_mode("error")
    try:
        completion_logprob(*args, backend=backend)
        both(args, ones, backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("backend", FAST)
def test_work_goes_to_the_current_stream(backend: str) -> None:
    hidden, *rest = device_args(LogprobCase(64, 512, 32000), torch.bfloat16)
    ones = torch.ones(64, device="cuda")
    want = (completion_logprob(hidden, *rest, backend=backend), *both((hidden, *rest), ones, backend))
    late = torch.zeros_like(hidden)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        # The argument is ready long after the call: only the same stream orders them.
        torch.cuda._sleep(50_000_000)
        late.copy_(hidden)
        got = (completion_logprob(late, *rest, backend=backend), *both((late, *rest), ones, backend))
    stream.synchronize()
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("backend", FAST)
def test_a_graph_can_hold_the_call(backend: str) -> None:
    hidden, *rest = device_args(LogprobCase(64, 512, 32000), torch.bfloat16)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        completion_logprob(hidden, *rest, backend=backend)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = completion_logprob(hidden, *rest, backend=backend)
    hidden.copy_(torch.randn_like(hidden))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, completion_logprob(hidden, *rest, backend=backend))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("case", [LogprobCase(8, 8192, 300_000), LogprobCase(20_000, 64, 1 << 17)], ids=str)
def test_offsets_pass_two_to_the_31(case: LogprobCase, backend: str) -> None:
    """More weights, and more logits, than 32 bits count."""
    if torch.cuda.get_device_properties(0).total_memory < 60 * 2**30:
        pytest.skip("needs a large GPU")
    args = device_args(case, torch.bfloat16)
    # Targets at the far end of the vocabulary: their weights lie past the border.
    args[2][-4:] = torch.arange(case.n_vocab - 4, case.n_vocab, device="cuda")
    truth, _ = oracle(args, slice(-4, None))
    unrounded = arithmetic.widens(torch.device("cuda", 0), torch.bfloat16)
    close = {"rtol": 0.0, "atol": 1e-3 if unrounded else 0.2}
    torch.testing.assert_close(completion_logprob(*args, backend=backend)[-4:].double(), truth, **close)
    out, gradient = both(args, torch.ones(case.n_rows, device="cuda"), backend)
    torch.testing.assert_close(out[-4:].double(), truth, **close)
    assert gradient.isfinite().all()


@NEEDS_NATIVE
def test_what_cuda_refuses_is_an_exception_with_its_words() -> None:
    module = modules.cuda()
    rest = (0, 0, 0, 1, 0, 1.0, 0.0, 1.0, 0, 0, 0)
    with pytest.raises(RuntimeError, match="cudaSetDevice: invalid device ordinal"):
        module.reduce(0, 1, 4, *rest, 99, 0)
    with pytest.raises(ValueError, match="no reduction for products of dtype code 9"):
        module.reduce(9, 1, 4, *rest, 0, 0)
    args = device_args(LogprobCase(2, 8, 9), torch.float32)
    assert completion_logprob(*args, backend="native").isfinite().all()


def test_auto_never_raises_for_what_a_backend_refuses() -> None:
    hidden, weight, target, *_ = device_args(LogprobCase(2, 8, 9), torch.float32)
    flipped = torch._neg_view(hidden)
    if "triton" in FAST:
        with pytest.raises(ValidationError, match="lazily negated view"):
            completion_logprob(flipped, weight, target, backend="triton")
    torch.testing.assert_close(
        completion_logprob(flipped, weight, target), completion_logprob(-hidden, weight, target)
    )
