"""The Triton backend: what its kernels must do beyond the op's own tests, and where it runs.

Triton reads ``TRITON_INTERPRET`` when it is imported, so one test runs this file, ``test_triton_logprob.py`` and the
op's tests again in a process that has it set; the tests of `PLACES` need either that or a GPU.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import optable
import pytest
import torch
from optable import SteerCase
from test_steer_op import gradients, widened
from tolerances import assert_within
from torch import Tensor

from mechanex import backends
from mechanex.backends import native, reference
from mechanex.backends import triton as backend
from mechanex.backends.native import modules
from mechanex.errors import ValidationError
from mechanex.ops.steer import steer

pytest.importorskip("triton")

HERE = Path(__file__).resolve().parent
INTERPRETED = backend.interpreted()
PLACES = ["cpu"] if INTERPRETED else [pytest.param("cuda", marks=pytest.mark.gpu)]

# What others of its kind stand for where kernels run slowly.
LONG = [pytest.mark.long] if INTERPRETED else []

on_each_device = pytest.mark.parametrize("device", PLACES)
outside_the_interpreter = pytest.mark.skipif(INTERPRETED, reason="runs outside the interpreter only")


@pytest.fixture
def kernels() -> SimpleNamespace:
    """What the files in `kernels/` offer."""
    return SimpleNamespace(
        launch=backend._kernel("launch"),
        steer=backend._kernel("steer").steer,
        gradients=backend._kernel("steer_gradients").gradients,
    )


def environment(**variables: str) -> dict[str, str]:
    """This process's variables without those that would change how a child runs, and with ``variables``."""
    drop = ("PYTEST_ADDOPTS", "TRITON_INTERPRET", "MECHANEX_BACKEND")
    return {k: v for k, v in os.environ.items() if k not in drop} | variables


def python(*arguments: str, cwd: Path = HERE, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=environment(**variables),
        capture_output=True,
        text=True,
        check=False,
    )


def assert_forward(got: Tensor, args: optable.Args) -> None:
    truth, scale = reference.steer(*widened(args)), reference.steer(*widened(args, magnitude=True))
    assert_within(got, truth, scale, args[0].shape[1])


@pytest.mark.slow
@outside_the_interpreter
@pytest.mark.parametrize(
    "cases",
    [pytest.param("one of a kind", marks=pytest.mark.ci), pytest.param("all", marks=pytest.mark.long)],
)
def test_under_the_interpreter(cases: str) -> None:
    # Finite differences take thousands of calls: `test_second_derivatives_exist` stands for them. The op's test of
    # equal bits has 700 rows; the one here does the same with fewer.
    selection = "triton and not finite_differences and not the_same_call"
    files = "test_steer_op.py", "test_steer_many.py", "test_triton.py", "test_triton_logprob.py"
    arguments = "-q", "-p", "no:cacheprovider", *files, "-k", selection
    done = python(
        *("-m", "pytest", *arguments, *(["-m", ""] if cases == "all" else [])),
        TRITON_INTERPRET="1",
        CUDA_VISIBLE_DEVICES="",
        PYTEST_DISABLE_PLUGIN_AUTOLOAD="1",
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None and int(passed[1]) > 160, done.stdout[-1000:]


@outside_the_interpreter
def test_launches_that_share_a_compiled_kernel_are_one_kind_to_triton() -> None:
    """Triton's own specialization of each argument, for a GPU that need not be there, differs only where ours does."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend
    from triton.runtime.jit import native_specialize_impl

    launcher = backend._kernel("launch").Launcher
    gpu = type(make_backend(GPUTarget("cuda", 90, 32)))
    memory = torch.zeros(64)
    tensors = [
        memory[start:].to(dtype) for start in (0, 1, 4, 7) for dtype in (torch.float32, torch.bfloat16)
    ]
    tensors += [memory[1:], memory.to(torch.float64)[1:], memory.to(torch.int32)[3:]]
    numbers = [0, 1, 2, 15, 16, 17, 48, 4096, 2**31 - 1, 2**31, 2**31 + 1, 2**40 + 16]
    numbers += [-1, -16, -(2**31), -(2**31) - 1, -(2**52)]
    kinds: dict[object, set[object]] = {}
    for argument in (None, *tensors, *numbers):
        (ours,), _ = launcher.described((argument,))
        for specialize in (True, False):
            theirs = native_specialize_impl(gpu, argument, False, specialize, True)
            kinds.setdefault((ours, specialize), set()).add(theirs)
    assert all(len(found) == 1 for found in kinds.values()), kinds
    assert len(kinds) > 16


@outside_the_interpreter
def test_the_second_launch_of_a_kind_goes_to_the_compiled_kernel_itself(
    kernels: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = backend._kernel("launch")
    monkeypatch.setattr(module, "stream_of", lambda device: 5)
    calls: list[tuple[object, ...]] = []

    class Compiled:
        def __getitem__(self, grid: object) -> object:
            return lambda *values, stream: calls.append(("direct", grid, values, stream))

    class Jitted:
        def __getitem__(self, grid: object) -> object:
            return lambda *values, **options: calls.append(("look-up", grid)) or Compiled()

    launch = module.Launcher(Jitted())
    x = torch.zeros(32)
    for tensor, number in ((x, 16), (x.clone(), 32), (x[1:], 16), (x, 17), (x.double(), 16), (x, 48)):
        launch((2, 1, 1), torch.device("cuda:0"), (tensor, None, number), (4,), 8)
    assert [call[0] for call in calls] == ["look-up", "direct", "look-up", "look-up", "look-up", "direct"]
    assert calls[-1] == ("direct", (2, 1, 1), (x.data_ptr(), None, 48, 4), 5)


@on_each_device
@pytest.mark.parametrize("rows", ["mixed", "none"])
def test_launches_that_are_made_again_give_the_same_bits(
    kernels: SimpleNamespace, device: str, rows: str
) -> None:
    args = SteerCase(6, 31, n_edits=1 if rows == "none" else 3, rank=2, rows=rows).make(
        torch.bfloat16, device
    )
    hidden, at, *tables = args
    for given in (hidden, hidden + 1, hidden.flip(0), hidden[1:], hidden[2:]):
        own = None if at is None else at[: len(given)]
        again = steer(given, own, *tables, backend="triton")
        assert torch.equal(again, kernels.steer(given, own, *tables))


@on_each_device
@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=LONG), 3])
@pytest.mark.parametrize("rows_at_a_time", [1, pytest.param(4, marks=LONG), 16])
def test_rows_that_share_a_program_keep_their_own_edits(
    kernels: SimpleNamespace, device: str, rows_at_a_time: int, rank: int
) -> None:
    args = SteerCase(45, 47, n_edits=3, rank=rank, rows="mixed").make(torch.bfloat16, device)
    rows = args[1]
    # Whole programs with one edit, with none, and a last one that is not full.
    rows[0:16], rows[16:32], rows[41:] = 2, -1, 1
    columns = 32 if rank == 0 else 64
    block = kernels.launch.Block(rows_at_a_time, columns, 4)
    got = kernels.steer(*args, block=block)
    assert_forward(got, args)
    assert torch.equal(got[16:32].view(torch.int16), args[0][16:32].view(torch.int16))


@on_each_device
def test_many_rows_take_several_at_a_time(kernels: SimpleNamespace, device: str) -> None:
    args = SteerCase(kernels.launch.MANY_ROWS, 31, n_edits=2, rank=2, rows="mixed").make(
        torch.float32, device
    )
    assert kernels.launch.block_for(*args[0].shape, 2, torch.float32).rows > 1
    assert_forward(steer(*args, backend="triton"), args)


@on_each_device
def test_every_width_has_a_block(kernels: SimpleNamespace, device: str) -> None:
    for width in (1, 128, 129, 4096, 5120, kernels.launch.MAX_WIDTH):
        for rank in (0, 1, kernels.launch.MAX_RANK):
            for wide in (torch.float32, torch.float64):
                for n_rows in (1, 10_000):
                    block = kernels.launch.block_for(n_rows, width, rank, wide)
                    assert block.columns >= min(width, 1024) and block.rows * block.columns <= 32768
                    assert rank == 0 or block.columns >= width


@on_each_device
@pytest.mark.parametrize("rank", [pytest.param(0, marks=LONG), 2, pytest.param(5, marks=LONG)])
def test_table_gradients_over_many_chunks_and_edits_without_rows(device: str, rank: int) -> None:
    hidden, rows, *tables = SteerCase(70, 31, n_edits=9, rank=rank, rows="mixed").make(torch.float32, device)
    # Edit 4 fills a chunk and more; edits 5, 6 and 8 have no row.
    rows[:40] = 4
    rows[(rows == 5) | (rows == 6) | (rows == 8)] = -1
    args = (hidden, rows, *tables)
    cotangent = torch.randn(70, 31, dtype=torch.float64).to(device, torch.float32)
    got = gradients(lambda *a: steer(*a, backend="triton"), args, cotangent)
    truth = gradients(reference.steer, widened(args), cotangent.double())
    scale = gradients(reference.steer, widened(args, magnitude=True), cotangent.double().abs())
    for ours, want, size in zip(got, truth, scale, strict=True):
        if want is not None:
            assert_within(ours, want, size, 70)
    assert not got[1][[5, 6, 8]].any()


@on_each_device
def test_results_fill_all_of_their_memory_and_are_the_same_bits_twice(device: str) -> None:
    # Deterministic mode fills new memory with NaN and refuses torch operations that are not reproducible.
    args = SteerCase(37, 20, n_edits=3, rank=2, rows="mixed").make(torch.float32, device)
    cotangent = torch.randn(37, 20).to(device)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty_like(cotangent).isnan().all()
        first, second = (
            [
                steer(*args, backend="triton"),
                *gradients(lambda *a: steer(*a, backend="triton"), args, cotangent),
            ]
            for _ in range(2)
        )
    finally:
        torch.use_deterministic_algorithms(False)
    for one, other in zip(first, second, strict=True):
        assert not one.isnan().any()
        assert torch.equal(one, other)


@on_each_device
@pytest.mark.parametrize("rows_at_a_time", [1, 4])
def test_rows_outside_the_table_are_nan_and_count_in_no_gradient(
    kernels: SimpleNamespace, device: str, rows_at_a_time: int
) -> None:
    hidden, rows, *tables = SteerCase(7, 16, n_edits=3, rank=2, rows="mixed").make(torch.float32, device)
    rows[:] = torch.tensor([0, -2, 3, 2**31 - 1, -(2**31), -1, 2], device=device)
    out = kernels.steer(hidden, rows, *tables, block=kernels.launch.Block(rows_at_a_time, 16, 4))
    assert out[1:5].isnan().all()
    inside = torch.tensor([0, 5, 6], device=device)
    few = (hidden[inside], rows[inside], *tables)
    assert_forward(out[inside], few)
    every = (True, True, True)
    grad = torch.ones_like(hidden)
    of_all = kernels.gradients(grad, hidden, rows, *tables, every)
    of_few = kernels.gradients(grad[inside], *few, every)
    for one, other in zip(of_all, of_few, strict=True):
        assert torch.equal(one, other)


@on_each_device
def test_the_kernels_compute_the_table_gradients(
    kernels: SimpleNamespace, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    compute = kernels.gradients

    def record(*args: object) -> object:
        asked.append(args[-1])
        return compute(*args)

    monkeypatch.setattr(backend._kernel("steer_gradients"), "gradients", record)
    hidden, rows, bias, left, right = SteerCase(5, 8, n_edits=2, rank=1, rows="mixed").make(
        torch.float32, device
    )
    steer(
        hidden, rows, bias.requires_grad_(), left, right.requires_grad_(), backend="triton"
    ).sum().backward()
    steer(
        hidden.requires_grad_(), rows, bias.detach(), left, right.detach(), backend="triton"
    ).sum().backward()
    assert asked == [(True, False, True)]


@on_each_device
def test_second_derivatives_exist(device: str) -> None:
    hidden, rows, *tables = SteerCase(6, 8, n_edits=2, rank=2, rows="mixed").make(torch.float64, device)

    def second(name: str) -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in (hidden, *tables)]
        out = steer(leaves[0], rows, *leaves[1:], backend=name)
        first = torch.autograd.grad(out.sin().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    for ours, want in zip(second("triton"), second("eager"), strict=True):
        torch.testing.assert_close(ours, want)


@on_each_device
def test_what_the_kernels_refuse_and_why(kernels: SimpleNamespace, device: str) -> None:
    ones = torch.ones(2, 8, device=device)
    high = SteerCase(2, 8, rank=kernels.launch.MAX_RANK + 1).make(torch.float32, device)
    with pytest.raises(
        ValidationError, match=r"the rank is 65, the kernels take at most 64; choose auto or eager"
    ):
        steer(*high, backend="triton")
    broad = SteerCase(1, kernels.launch.MAX_WIDTH + 1, rank=1).make(torch.float32, device)
    with pytest.raises(ValidationError, match=r"the width is 32769, .* at most 32768 wide"):
        steer(*broad, backend="triton")
    with pytest.raises(ValidationError, match=r"got torch\.float8_e4m3fn: convert it to float32"):
        steer(ones.to(torch.float8_e4m3fn), None, ones[:1], backend="triton")
    with pytest.raises(ValidationError, match="lazily negated view"):
        steer(torch._neg_view(ones), None, ones[:1], backend="triton")
    # What it refuses, auto leaves to another backend; edits that only add have no such limits.
    assert steer(*high, backend="auto").shape == (2, 8)
    hidden, rows, bias, *_ = broad
    torch.testing.assert_close(steer(hidden, rows, bias, backend="triton"), hidden + bias)


@pytest.mark.gpu
@outside_the_interpreter
def test_auto_takes_triton_on_a_gpu_but_leaves_additions_to_torch_and_small_calls_to_native() -> None:
    args = SteerCase(4, 16, n_edits=2, rank=1, rows="mixed").make(torch.float32, "cuda")
    small = backend.steer if modules.missing_cuda() else native.steer
    assert backends.kernel("steer", "auto", *args) is small
    assert backends.gradients("steer", "auto", *args) is backend.steer_gradients
    many = args[0].expand(backends.LAUNCH_BOUND // 64 + 1, 4, 16).reshape(-1, 16)
    assert backends.kernel("steer", "auto", many, None, *args[2:]) is backend.steer
    hidden, _, bias, *_ = args
    assert backends.kernel("steer", "auto", hidden, None, bias[:1], None, None) is not backend.steer


@pytest.mark.gpu
@outside_the_interpreter
def test_the_current_stream_and_the_tensors_device_are_used() -> None:
    args = SteerCase(64, 256, rank=1).make(torch.float32, f"cuda:{torch.cuda.device_count() - 1}")
    want = steer(*args, backend="eager")
    stream = torch.cuda.Stream(args[0].device)
    stream.wait_stream(torch.cuda.current_stream(args[0].device))
    with torch.cuda.stream(stream):
        got = steer(*args, backend="triton")
    stream.synchronize()
    torch.testing.assert_close(got, want)
