"""What a call of the steer op costs the calling thread beside its arithmetic and the driver, without a GPU.

The CPU's tensors stand for a GPU's, one row of 64 numbers, so that there is hardly any arithmetic: on a GPU a call adds
what the driver takes for a launch. Triton's kernel is launched by a compiled function that does nothing.

pytest benchmarks/test_launch.py
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from interleaved import medians
from torch import nn

from mechanex import backends
from mechanex.backends import native
from mechanex.backends import triton as triton_backend
from mechanex.engine.intervention import Edit, EditTable
from mechanex.engine.models.huggingface import _residual_hook
from mechanex.engine.stream import Stream
from mechanex.ops.steer import steer

CALLS = 100  # ways take turns before a busy machine changes its pace
WIDTH = 64
DLPACK_CPU = 1


def repeated(call):
    def run():
        for _ in range(CALLS):
            call()

    return run


def add(report, title, ways, base="torch add"):
    with torch.no_grad():
        found = medians({name: repeated(call) for name, call in ways.items()}, rounds=301)
    each = {name: seconds / CALLS for name, seconds in found.items()}
    notes = {name: f"{(each[name] - each[base]) * 1e6:+.2f} µs" for name in each if name != base}
    report.add(title, each, base, notes=notes)


def arguments():
    x, rows = torch.randn(1, WIDTH), torch.zeros(1, dtype=torch.int32)
    bias, (left, right) = torch.randn(1, WIDTH), torch.randn(2, 1, 1, WIDTH)
    return x, rows, bias, left, right


def test_the_op(report, benchmark):
    x, rows, bias, left, right = arguments()
    ways = {
        "torch add": lambda: x + bias,
        "torch empty_like": lambda: torch.empty_like(x),
        "add, auto": lambda: steer(x, None, bias),
    }
    for name in ("native", "eager"):
        ways[f"add, {name}"] = lambda name=name: steer(x, None, bias, backend=name)
        ways[f"clamp, {name}"] = lambda name=name: steer(x, None, bias, left, right, backend=name)
        ways[f"clamp by row, {name}"] = lambda name=name: steer(x, rows, bias, left, right, backend=name)
    add(report, "host, one call of the op on [1, 64] float32", ways)
    benchmark.pedantic(repeated(ways["clamp, native"]), rounds=1)


def test_an_edit_in_a_hook(report, benchmark):
    """As decoding attaches it, on a layer that does nothing."""
    x = torch.randn(1, 1, WIDTH)
    bound = EditTable([Edit.clamp(torch.randn(WIDTH), 1.0)]).bound()
    layers = [nn.Identity() for _ in range(3)]
    hooks = (lambda module, args, kwargs: None, _residual_hook(Stream(WIDTH, "a model"), bound))
    for layer, hook in zip(layers[1:], hooks, strict=True):
        layer.register_forward_pre_hook(hook, with_kwargs=True)
    names = ("no hook", "a hook that does nothing", "a clamp")
    ways = {name: lambda layer=layer: layer(x) for name, layer in zip(names, layers, strict=True)}
    add(report, "host, one layer that is steered, [1, 1, 64] float32", ways, base="no hook")
    benchmark.pedantic(repeated(ways["a clamp"]), rounds=1)


# A compiled function that takes any arguments and does nothing with them.
NOTHING = object.__subclasshook__


@pytest.mark.skipif(native.replays() is None, reason="needs mechanex._native and torch 2.10")
def test_tritons_launches(report, benchmark, monkeypatch):
    triton = pytest.importorskip("triton")
    nvidia = pytest.importorskip("triton.backends.nvidia.driver")
    if triton_backend.interpreted():
        pytest.skip("TRITON_INTERPRET is set")
    monkeypatch.setattr(triton.runtime.driver, "_active", SimpleNamespace())
    launcher = nvidia.CudaLauncher.__new__(nvidia.CudaLauncher)
    vars(launcher).update(
        launch=NOTHING,
        num_ctas=1,
        global_scratch_size=0,
        global_scratch_align=1,
        profile_scratch_size=0,
        profile_scratch_align=1,
        launch_cooperative_grid=False,
        launch_pdl=False,
        gsan_enabled=False,
        arg_annotations=[],
        kernel_signature=b"",
    )

    class Kernel(triton.compiler.CompiledKernel):
        """One that needs no GPU."""

        def __init__(self):
            self.module, self.function, self._run, self.src = 1, 1, launcher, None
            self.packed_metadata, self.name, self._module_pid = (4, 1, 0), "steer", 0

    class Jitted:
        def __getitem__(self, grid):
            return lambda *arguments, **options: Kernel()

    module, launching = triton_backend._kernel("steer"), triton_backend._kernel("launch")
    once = launching.Launcher(Jitted())
    once._direct = True
    monkeypatch.setattr(module, "_launch", once)
    monkeypatch.setattr(launching, "stream_of", lambda device: 0)
    direct = module.direct(native.replays(), triton_backend.refuses_steer, DLPACK_CPU)
    monkeypatch.setattr(triton_backend, "direct", lambda: direct)
    monkeypatch.setattr(backends, "_is_on_gpu", lambda tensor: True)

    x, rows, bias, left, right = arguments()
    ways = {
        "torch add": lambda: x + bias,
        "add": lambda: steer(x, None, bias, backend="triton"),
        "clamp": lambda: steer(x, None, bias, left, right, backend="triton"),
        "clamp by row": lambda: steer(x, rows, bias, left, right, backend="triton"),
        "clamp by row, launched from Python": lambda: module.steer(x, rows, bias, left, right),
    }
    kernel = Kernel()
    grid, _, tensors, constants, _ = module._described(x, torch.empty_like(x), rows, bias, left, right)
    values = (*launching.Launcher.described(tensors)[1], *constants)
    ways["Triton's launch of a compiled kernel alone"] = lambda: kernel[grid](*values, stream=0)
    add(report, f"host, one call of the op by Triton {triton.__version__}, [1, 64] float32", ways)
    benchmark.pedantic(repeated(ways["clamp by row"]), rounds=1)
