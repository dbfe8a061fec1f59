"""The compiled CUDA kernels (`csrc/cuda/`), called with raw pointers on torch's current stream."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from mechanex._private.torch import exchange_table, stream_getter
from mechanex._version import __version__

from .eager import compute_dtype

__all__ = ["MANY_WIDTH", "describe", "direct", "missing", "steer"]

# Widest row of a half type that takes several edits: it waits in a block's shared memory, float32.
MANY_WIDTH = 24_000
_DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_HOW = (
    "install the CUDA toolkit (nvcc) and run `MECHANEX_CUDA=ON pip install --force-reinstall --no-deps .` in a "
    "source folder"
)


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    """The compiled module, and why it is absent."""
    try:
        import mechanex._native_cuda as _native_cuda
    except ModuleNotFoundError as error:
        if error.name != "mechanex._native_cuda":
            raise
        return None, f"the compiled module mechanex._native_cuda is not installed; {_HOW}"
    except ImportError as error:
        return None, f"the compiled module mechanex._native_cuda did not load ({error}); {_HOW}"
    if _native_cuda.__version__ != __version__:
        return None, (
            f"the compiled CUDA module is version {_native_cuda.__version__}, the rest is {__version__}; {_HOW}"
        )
    return _native_cuda, None


@functools.cache
def _module() -> ModuleType:
    module, reason = _load()
    if module is None:
        raise ImportError(reason)
    return module


@functools.cache
def missing() -> str | None:
    """Why the kernels can't run on torch's current CUDA device and what to do about it, or None."""
    module, reason = _load()
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
            f"{_readable(module.driver_version())}); update the driver, or rebuild here: {_HOW}, with "
            "MECHANEX_CUDA_ARCHITECTURES=native"
        )
    return None


def describe() -> str:
    """CUDA version inside and the architectures that the build has code for."""
    module = _module()
    return f"CUDA {_readable(module.runtime_version())} for {module.architectures}"


def _readable(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


_stream_getter = functools.cache(stream_getter)


@functools.cache
def direct() -> Callable[..., Tensor | None] | None:
    """The steer op on torch's tensors themselves, a fraction of :func:`steer`'s work for the calling thread.

    It takes hidden ``[..., d]``, rows, bias, left and right, and gives None for whatever isn't plain: an argument that
    isn't contiguous, dtypes that would have to be converted, shapes that don't fit. None where the kernels don't run or
    torch (before 2.10) doesn't show its tensors to compiled code.
    """
    table = exchange_table()
    if missing() is not None or table is None:
        return None
    module = _module()
    if not module.direct_setup(table, torch.Tensor, torch.nn.Parameter, torch.empty_like):
        return None
    found: Callable[..., Tensor | None] = module.steer_direct
    return found


def steer(
    hidden: Tensor, rows: Tensor | None, bias: Tensor | None, left: Tensor | None, right: Tensor | None
) -> Tensor:
    """``y = x + b + Lᵀ(R x)`` per row; shapes and meaning as in :func:`mechanex.backends.reference.steer`.

    Nothing waits for the device: a row whose index is out of range becomes NaN, and an error of a running
    kernel shows up where the stream is next waited for.

    Raises:
        RuntimeError: CUDA refused the launch.
    """
    dtype = hidden.dtype
    wide = compute_dtype(hidden, bias, left, right)
    x = hidden if wide is torch.float32 else hidden.to(wide)
    if x.stride(1) != 1:
        x = x.contiguous()
    n_rows, width = x.shape
    # Edits of the rows' own half type are read as they are; converting them would cost a launch each.
    if wide is not x.dtype and any(t is not None and t.dtype is not dtype for t in (bias, left, right)):
        table_dtype = wide
    else:
        table_dtype = x.dtype
    bias, left, right = _table(bias, table_dtype), _table(left, table_dtype), _table(right, table_dtype)
    table = left if bias is None else bias
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    device = x.get_device()
    _module().steer(
        _DTYPE_CODES[x.dtype],
        _DTYPE_CODES[table_dtype],
        n_rows,
        width,
        x.data_ptr(),
        x.stride(0),
        out.data_ptr(),
        width,
        0 if rows is None else rows.data_ptr(),
        0 if rows is None else rows.stride(0),
        0 if bias is None else bias.data_ptr(),
        0 if left is None else left.data_ptr(),
        0 if right is None else right.data_ptr(),
        0 if table is None else table.shape[0],
        0 if left is None else left.shape[1],
        device,
        _stream_getter()(device),
    )
    return out if out.dtype is dtype else out.to(dtype)


def _table(table: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if table is None or (table.dtype is dtype and table.is_contiguous()):
        return table
    return table.to(dtype).contiguous()
