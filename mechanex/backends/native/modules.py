"""The compiled modules: found, set up and called with raw pointers; on the CPU, threads are borrowed from torch.

There are two, `mechanex._native` (`csrc/`) and `mechanex._native_cuda` (`csrc/cuda/`, on torch's current stream), and
either may be absent.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from mechanex._private.torch import exchange_table, parallel_for_address, stream_of
from mechanex._version import __version__
from mechanex.errors import ValidationError

__all__ = [
    "DTYPE_CODES",
    "address",
    "cpu",
    "cuda",
    "describe",
    "describe_cuda",
    "direct",
    "levels",
    "missing",
    "missing_cuda",
    "on_stream",
    "replays",
    "shows_tensors",
    "table",
]

DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_CPU = (
    "install a C++17 compiler (gcc or clang) and run `pip install --force-reinstall --no-deps .` in a source "
    "folder, or install a published wheel, with MECHANEX_PURE unset"
)
_CUDA = (
    "install the CUDA toolkit (nvcc) and run `MECHANEX_CUDA=ON pip install --force-reinstall --no-deps .` in a "
    "source folder"
)
# What a module's functions take and give, as a number in it; one without is of the first kind.
_INTERFACES = {"_native": 2, "_native_cuda": 2}


@functools.cache
def load(name: str, how: str) -> tuple[ModuleType | None, str | None]:
    """The compiled module ``mechanex.<name>``, and why it is absent and what to do about it."""
    path = f"mechanex.{name}"
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name != path:
            raise
        return None, f"the compiled module {path} is not installed; {how}"
    except ImportError as error:
        return None, f"the compiled module {path} did not load ({error}); {how}"
    if module.__version__ != __version__:
        return (
            None,
            f"the compiled module {path} is version {module.__version__}, the rest is {__version__}; {how}",
        )
    found, wanted = getattr(module, "interface", 1), _INTERFACES.get(name, 1)
    if found != wanted:
        return (
            None,
            f"the compiled module {path} was built from other sources (interface {found}, the rest needs {wanted}); "
            f"{how}",
        )
    return module, None


def _loaded(name: str, how: str) -> ModuleType:
    module, reason = load(name, how)
    if module is None:
        raise ImportError(reason)
    return module


@functools.cache
def cpu() -> ModuleType:
    """The compiled module for the CPU, set up: instruction set chosen, threads handed over."""
    module = _loaded("_native", _CPU)
    wanted = os.environ.get("MECHANEX_CPU_ISA", "").strip().lower()
    try:
        module.select_level(wanted)
    except ValueError as error:
        raise ValidationError(
            f"MECHANEX_CPU_ISA={wanted}: {error}; unset it to take the best level"
        ) from None
    module.set_parallel_for(parallel_for_address())
    return module


@functools.cache
def cuda() -> ModuleType:
    """The compiled module for CUDA."""
    return _loaded("_native_cuda", _CUDA)


def missing() -> str | None:
    """Why the kernels can't run here and what to do about it, or None.

    Raises:
        ValidationError: ``MECHANEX_CPU_ISA`` names an instruction set that is unknown or missing here.
    """
    reason = load("_native", _CPU)[1]
    if reason is None:
        cpu()
    return reason


@functools.cache
def missing_cuda() -> str | None:
    """Why the kernels can't run on torch's current CUDA device and what to do about it, or None."""
    module, reason = load("_native_cuda", _CUDA)
    if module is None:
        return reason
    if torch.version.hip is not None:
        return "this torch is built for ROCm, the kernels for CUDA; choose auto or eager"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device; install a driver and a torch built for CUDA"
    try:
        module.check_device(torch.cuda.current_device())
    except (RuntimeError, ValueError) as error:
        return (
            f"the compiled CUDA module can't use this device ({error}; built with CUDA "
            f"{_readable(module.runtime_version())} for {module.architectures}, the driver serves "
            f"{_readable(module.driver_version())}); update the driver, or rebuild here: {_CUDA}, with "
            "MECHANEX_CUDA_ARCHITECTURES=native"
        )
    return None


def levels() -> tuple[str, ...]:
    """Instruction sets that the build and this processor share, best last."""
    return tuple(cpu().levels())


def describe() -> str:
    """Instruction set in use, those available, where the threads come from, and the CUDA part or its lack."""
    threads = "torch's threads" if parallel_for_address() else "one thread (torch before 2.10 lends none)"
    reason = missing_cuda()
    gpu = f"not on GPUs: {reason}" if reason else describe_cuda()
    return f"{cpu().level()} of {', '.join(levels())}; {threads}; {gpu}"


def describe_cuda() -> str:
    """CUDA version inside and the architectures that the build has code for."""
    return f"CUDA {_readable(cuda().runtime_version())} for {cuda().architectures}"


def _readable(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


@functools.cache
def direct(device: str) -> Callable[..., Tensor | None] | None:
    """The steer op of a compiled module on torch's tensors themselves, a fraction of the work for the calling thread.

    It takes hidden ``[..., d]``, rows, bias, left, right and strength, and gives None for whatever isn't plain: an
    argument that isn't contiguous, dtypes that would have to be converted, shapes that don't fit. None where the
    kernels don't run or torch (before 2.10) doesn't show its tensors to compiled code.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
    """
    reason, module = (missing_cuda(), cuda) if device == "cuda" else (missing(), cpu)
    if reason is not None or not shows_tensors(module()):
        return None
    found: Callable[..., Tensor | None] = module().steer_direct
    return found


def shows_tensors(module: ModuleType) -> bool:
    """Whether torch's tensors can be read by a compiled module itself, which can do so from now on."""
    table = exchange_table()
    return table is not None and bool(
        module.direct_setup(table, torch.Tensor, torch.nn.Parameter, torch.empty_like)
    )


@functools.cache
def replays() -> Callable[..., Tensor | bytes | None] | None:
    """What makes launches of Triton's steer kernel again (`csrc/replay.h`), for tensors on any device; None without."""
    module, _ = load("_native", _CPU)
    if module is None or not shows_tensors(module):
        return None
    found: Callable[..., Tensor | bytes | None] = module.steer_replayed
    return found


def address(tensor: Tensor | None) -> int:
    """Where a tensor's memory begins; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def table(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A tensor in the dtype that a kernel reads, contiguous."""
    if tensor is None or (tensor.dtype is dtype and tensor.is_contiguous()):
        return tensor
    return tensor.to(dtype).contiguous()


def on_stream(tensor: Tensor) -> tuple[int, int]:
    """The device of a tensor and torch's current stream on it, as the CUDA kernels take them."""
    device = tensor.get_device()
    return device, stream_of(device)
