"""Triton's launches made again without Triton's work, for a GPU that need not be there."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from optable import SteerCase
from test_triton import INTERPRETED, assert_forward
from torch import Tensor

from mechanex import backends
from mechanex.backends import eager, native
from mechanex.backends import triton as backend

triton = pytest.importorskip("triton")

pytestmark = pytest.mark.skipif(INTERPRETED, reason="runs outside the interpreter only")
needs_the_module = pytest.mark.skipif(
    native.replays() is None, reason="needs mechanex._native and torch 2.10"
)

DLPACK_CPU = 1
FORMS = ("flat", "nested")


class OnHost:
    """Stands for the jitted kernel: what it "compiles" is for the kind of arguments it was given, and checks that it
    gets no others. Its launches compute on the CPU what stands at the addresses that they are given.

    Args:
        form: how its launcher hands on arguments, in a row or as one tuple.
    """

    def __init__(self, form: str) -> None:
        self.form = form
        self.looked_up = self.launched = 0

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., Any]:
        def look_up(*arguments: Any, num_warps: int, **_: object) -> Any:
            self.looked_up += 1
            addresses = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
            compiled = SimpleNamespace(function=7, packed_metadata=(num_warps, 1, 0))
            compiled.run = Launcher(self.form, self._compiled(arguments, addresses))
            compiled.run(*grid, 0, 7, compiled.packed_metadata, None, None, None, *addresses)
            return compiled

        return look_up

    def _compiled(self, arguments: tuple[Any, ...], first: list[Any]) -> Callable[..., None]:
        dtypes = [a.dtype if isinstance(a, Tensor) else None for a in arguments]

        def launch(*given: Any) -> None:
            *grid, stream, function, metadata = given[:6]
            values = given[-1] if self.form == "nested" else given[-15:]
            assert (stream, function, metadata[1:]) == (0, 7, (1, 0))
            for dtype, value, of_first in zip(dtypes[:6], values[:6], first[:6], strict=True):
                assert (value is None) == (dtype is None)
                assert dtype is None or (value % 16 == 0) == (of_first % 16 == 0)
            n_rows, n_edits, width, stride, rows_stride, rank, block_rows, block_columns, _ = values[6:]
            assert values[8:11] == tuple(first[8:11]) and values[11:] == tuple(first[11:])
            assert tuple(grid) == (math.ceil(n_rows / block_rows), math.ceil(width / block_columns), 1)
            shapes = [(n_rows, width), (n_rows, width), (n_rows,), (n_edits, width)]
            shapes += [(n_edits, rank, width)] * 2
            assert stride == width and rows_stride == (values[2] is not None)
            x, y, *edit = map(at_address, values[:6], shapes, dtypes)
            y.copy_(eager.steer(x, *edit))
            self.launched += 1

        return launch


class Launcher:
    """Stands for Triton's, which is written in Python around a compiled ``launch``."""

    def __init__(self, form: str, launch: Callable[..., None]) -> None:
        self.form, self.launch = form, launch

    def __call__(self, x: Any, y: Any, z: Any, stream: Any, function: Any, metadata: Any, *rest: Any) -> None:
        *hooks, values = *rest[:3], rest[3:]
        if self.form == "nested":
            self.launch(x, y, z, stream, function, metadata, *hooks, False, None, values)
        else:
            self.launch(x, y, z, stream, function, metadata, *hooks, None, *values)


def at_address(address: int | None, shape: tuple[int, ...], dtype: torch.dtype | None) -> Tensor | None:
    if address is None or dtype is None:
        return None
    n = math.prod(shape)
    memory = (ctypes.c_char * (n * dtype.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=dtype, count=n).view(shape)


@pytest.fixture(params=FORMS)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[OnHost]:
    """The steer kernel's stand-in, with no launch known."""
    launching, module = backend._kernel("launch"), backend._kernel("steer")
    monkeypatch.setattr(launching, "stream_of", lambda device: 0)
    on_host = OnHost(request.param)
    launcher = launching.Launcher(on_host)
    launcher._direct = True
    monkeypatch.setattr(module, "_launch", launcher)
    return on_host


@pytest.fixture
def direct(kernel: OnHost) -> Callable[..., Tensor | None]:
    found: Callable[..., Tensor | None] = backend._kernel("steer").direct(
        native.replays(), backend.refuses_steer, DLPACK_CPU
    )
    return found


CASES = [
    SteerCase(1, 64),
    SteerCase(1, 64, rank=1),
    SteerCase(16, 64, n_edits=8, rank=1, rows="mixed"),
    SteerCase(5, 47, n_edits=3, rank=2, rows="mixed"),
    SteerCase(16, 64, n_edits=8, rank=1, rows="mixed", table=torch.float32),
    SteerCase(1030, 16, n_edits=2, rows="mixed"),
    SteerCase(3, 1, rank=1),
]


@needs_the_module
def test_calls_of_every_kind_in_turn_give_what_the_oracle_does(
    kernel: OnHost, direct: Callable[..., Tensor | None]
) -> None:
    calls = [(case, dtype) for case in CASES for dtype in (torch.float32, torch.bfloat16, torch.float64)]
    calls = [(case, dtype) for case, dtype in calls if case.table is None or dtype is torch.bfloat16]
    for n in range(3):
        for case, dtype in calls:
            args = case.make(dtype)
            out = direct(*args, None)
            assert out is not None and out.dtype is dtype and out.shape == args[0].shape
            assert_forward(out, args)
        assert kernel.looked_up <= len(calls)
        assert kernel.launched == (n + 1) * len(calls)


@needs_the_module
def test_how_many_rows_and_edits_there_are_needs_no_other_kernel_but_where_tensors_lie_does(
    kernel: OnHost, direct: Callable[..., Tensor | None]
) -> None:
    memory = torch.randn(4096)
    bias, left, right = torch.randn(4, 32), torch.randn(4, 2, 32), torch.randn(4, 2, 32)

    def at(start: int, n: int, edits: int = 4) -> None:
        hidden = memory[start : start + n * 32].view(n, 32)
        rows = (torch.arange(n, dtype=torch.int32) % (edits + 1)) - 1
        args = hidden, rows, bias[:edits], left[:edits], right[:edits]
        out = direct(*args, None)
        assert out is not None
        assert_forward(out, args)

    for n, edits in ((1, 1), (7, 4), (64, 3), (2, 2)):
        at(0, n, edits)
    assert kernel.looked_up == 1
    at(1, 7)
    at(5, 9)
    assert kernel.looked_up == 2
    at(4, 9)
    assert kernel.looked_up == 2
    # The launch goes where the tensors are now, not where they were.
    bias.data = torch.randn(4, 32)
    at(0, 7)
    bias.data = torch.randn(4 * 32 + 1)[1:].view(4, 32)
    at(0, 7)
    assert kernel.looked_up == 3


@needs_the_module
def test_leading_dimensions_are_rows(kernel: OnHost, direct: Callable[..., Tensor | None]) -> None:
    hidden, rows, *tables = SteerCase(12, 64, n_edits=3, rank=2, rows="mixed").make(torch.float32)
    flat = direct(hidden, rows, *tables, None)
    for _ in range(2):
        out = direct(hidden.view(3, 4, 64), rows.view(3, 4), *tables, None)
        assert out is not None and torch.equal(out.view(12, 64), flat)
    assert kernel.looked_up == 1


@needs_the_module
def test_the_stride_of_a_single_row_is_nobodys_kind(
    kernel: OnHost, direct: Callable[..., Tensor | None]
) -> None:
    _, _, *tables = SteerCase(1, 47, n_edits=3, rank=2, rows="mixed").make(torch.float32)
    apart = torch.randn(4, 64)[:1, :47], torch.ones(16, dtype=torch.int32)[::16]
    for hidden, rows in (apart, (torch.randn(5, 47), torch.arange(5, dtype=torch.int32) % 3)):
        out = direct(hidden, rows, *tables, None)
        assert out is not None
        assert_forward(out, (hidden, rows, *tables))
    assert kernel.looked_up == 1


@needs_the_module
def test_what_is_not_plain_is_left_to_the_usual_way(
    kernel: OnHost, direct: Callable[..., Tensor | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, rows, bias, left, right = args = SteerCase(6, 64, n_edits=3, rank=2, rows="mixed").make(
        torch.float32
    )
    high = SteerCase(2, 8, rank=64).make(torch.float32)
    assert direct(*args, torch.ones(6)) is None
    assert direct(hidden.T.contiguous().T, rows, bias, left, right, None) is None
    assert direct(hidden, rows.long(), bias, left, right, None) is None
    assert direct(hidden, rows, bias, left.double(), right, None) is None
    assert direct(torch._neg_view(hidden), rows, bias, left, right, None) is None
    assert direct(hidden, rows[:4], bias, left, right, None) is None
    monkeypatch.setattr(backend._kernel("launch"), "MAX_RANK", 63)
    assert direct(*high, None) is None
    assert kernel.looked_up == 0
    hooks = triton.knobs.runtime.launch_enter_hook
    if hasattr(hooks, "add"):
        assert direct(*args, None) is not None
        hooks.add(print)
        try:
            assert direct(*args, None) is None
        finally:
            hooks.remove(print)
    monkeypatch.setattr(backend._kernel("launch"), "_SETTINGS", None)
    assert direct(*args, None) is None


@needs_the_module
def test_the_op_takes_the_direct_way_where_it_was_asked_for(
    kernel: OnHost, direct: Callable[..., Tensor | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "direct", lambda: direct)
    monkeypatch.setattr(native, "direct", lambda device: None)
    monkeypatch.setattr(backends, "_is_on_gpu", lambda tensor: True)
    from mechanex.ops.steer import steer

    args = SteerCase(6, 64, n_edits=3, rank=2, rows="mixed").make(torch.float32)
    for name in ("triton", "auto"):
        assert_forward(steer(*args, backend=name), args)
    assert kernel.launched == 2
    x = args[0].clone().requires_grad_()
    assert backends.direct_steer("eager", x, None, None) is None
    with pytest.raises(backends.MechanexError, match="can't run here"):  # gradients take the usual way
        steer(x, *args[1:], backend="triton")


@pytest.mark.parametrize("scratch", [0, 8])
def test_launches_are_handed_on_as_tritons_own_launcher_does(
    scratch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton.runtime.driver, "_active", SimpleNamespace())
    driver = pytest.importorskip("triton.backends.nvidia.driver")
    launching = backend._kernel("launch")
    calls: list[tuple[Any, ...]] = []
    launcher = driver.CudaLauncher.__new__(driver.CudaLauncher)
    vars(launcher).update(
        launch=lambda *given: calls.append(given),
        num_ctas=1,
        global_scratch_size=scratch,
        global_scratch_align=16,
        profile_scratch_size=0,
        profile_scratch_align=1,
        launch_cooperative_grid=False,
        launch_pdl=False,
        gsan_enabled=False,
        arg_annotations=["annotations"],
        kernel_signature=b"signature",
    )

    class Compiled:
        run, function, packed_metadata = launcher, 5, (4, 1, 0)

        def __getitem__(self, grid: object) -> Callable[..., object]:
            return lambda *values, stream: calls.append(("by Triton", grid, stream, values))

    start = launching.Start(Compiled(), 4)
    assert calls == []
    start((3, 2, 1), 11, (16, None, 7, 32))
    if scratch:  # memory for each launch is Triton's business
        assert calls == [("by Triton", (3, 2, 1), 11, (16, None, 7, 32))]
        return
    launcher(3, 2, 1, 11, 5, (4, 1, 0), None, None, None, 16, None, 7, 32)
    assert len(calls) == 2 and calls[0] == calls[1]


def test_a_launcher_of_an_unknown_form_is_called_as_it_is() -> None:
    launching = backend._kernel("launch")

    class Reordered:
        def __init__(self) -> None:
            self.launch: Callable[..., object] = print

        def __call__(self, x: Any, y: Any, z: Any, stream: Any, *rest: Any) -> None:
            self.launch(stream, x, y, z, *rest)

    for run in (Reordered(), lambda *given: None, None):
        compiled = SimpleNamespace(run=run, function=5, packed_metadata=())
        assert launching.recorded(compiled, 3) is None
