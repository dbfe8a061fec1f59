"""The compiled kernels (`csrc/`), called with raw pointers; on the CPU, threads are borrowed from torch.

The CUDA ones are a module of their own: :mod:`mechanex.backends.native_cuda`.
"""

from __future__ import annotations

import functools
import os
from types import ModuleType

import torch
from torch import Tensor

from mechanex._private.torch import parallel_for_address
from mechanex._version import __version__
from mechanex.errors import ValidationError

from . import native_cuda
from .eager import compute_dtype

__all__ = ["declines_steer", "describe", "levels", "missing", "refuses_steer", "steer"]

# The kernel keeps a row's coordinates on its stack; beyond this, matrix products are faster anyway.
_MAX_RANK = 64
# Measured against plain torch on two CPU cores with AVX-512 (benchmarks/test_steer.py, the crossings): one edit of a
# higher rank is faster as matrix products, and on a single row so is one whose factors hold more numbers than this.
TORCH_RANK = 48
TORCH_TABLE = 1 << 17
_DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_NEGATED = "an argument is a lazily negated view, whose memory holds other values: call resolve_neg()"
_HOW = (
    "install a C++17 compiler (gcc or clang) and run `pip install --force-reinstall --no-deps .` in a source "
    "folder, or install a published wheel, with MECHANEX_PURE unset"
)


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    """The compiled module, and why it is absent."""
    try:
        import mechanex._native as _native
    except ModuleNotFoundError as error:
        if error.name != "mechanex._native":
            raise
        return None, f"the compiled module mechanex._native is not installed (a pure-Python install); {_HOW}"
    except ImportError as error:
        return None, f"the compiled module mechanex._native did not load ({error}); {_HOW}"
    if _native.__version__ != __version__:
        return None, (
            f"the compiled module is version {_native.__version__}, the rest is {__version__}; {_HOW}"
        )
    return _native, None


@functools.cache
def _module() -> ModuleType:
    """The compiled module, set up: instruction set chosen, threads handed over."""
    module, reason = _load()
    if module is None:
        raise ImportError(reason)
    wanted = os.environ.get("MECHANEX_CPU_ISA", "").strip().lower()
    try:
        module.select_level(wanted)
    except ValueError as error:
        raise ValidationError(
            f"MECHANEX_CPU_ISA={wanted}: {error}; unset it to take the best level"
        ) from None
    module.set_parallel_for(parallel_for_address())
    return module


def missing() -> str | None:
    """Why the backend can't run here and what to do about it, or None.

    Raises:
        ValidationError: ``MECHANEX_CPU_ISA`` names an instruction set that is unknown or missing here.
    """
    reason = _load()[1]
    if reason is None:
        _module()
    return reason


def levels() -> tuple[str, ...]:
    """Instruction sets that the build and this processor share, best last."""
    return tuple(_module().levels())


def describe() -> str:
    """Instruction set in use, those available, where the threads come from, and the CUDA part or its lack."""
    threads = "torch's threads" if parallel_for_address() else "one thread (torch before 2.10 lends none)"
    cuda = native_cuda.missing()
    gpu = f"not on GPUs: {cuda}" if cuda else native_cuda.describe()
    return f"{_module().level()} of {', '.join(levels())}; {threads}; {gpu}"


def refuses_steer(
    hidden: Tensor, rows: Tensor | None, bias: Tensor | None, left: Tensor | None, right: Tensor | None
) -> str | None:
    """Why the kernel can't take these arguments, or None."""
    if hidden.dtype not in _DTYPE_CODES:
        return f"hidden has dtype {hidden.dtype}, the kernels take float32, float64, bfloat16 and float16"
    if left is not None and left.shape[1] > _MAX_RANK:
        return f"the rank is {left.shape[1]}, the kernels take at most {_MAX_RANK}"
    if (
        hidden.is_neg()
        or (bias is not None and bias.is_neg())
        or (left is not None and left.is_neg())
        or (right is not None and right.is_neg())
    ):
        return _NEGATED
    return None


def declines_steer(
    hidden: Tensor, rows: Tensor | None, bias: Tensor | None, left: Tensor | None, right: Tensor | None
) -> str | None:
    """Why ``auto`` leaves these arguments to plain torch, or None."""
    if rows is None and left is None and bias is not None and bias.dtype is hidden.dtype:
        return "one vector added to every row is a plain addition"
    if left is not None and left.shape[0] == 1:
        rank, width = left.shape[1:]
        if rank > TORCH_RANK or (hidden.shape[0] == 1 and rank * width > TORCH_TABLE):
            return "one edit of high rank is two matrix products"
    return None


def steer(
    hidden: Tensor, rows: Tensor | None, bias: Tensor | None, left: Tensor | None, right: Tensor | None
) -> Tensor:
    """``y = x + b + Lᵀ(R x)`` per row; shapes and meaning as in :func:`mechanex.backends.reference.steer`.

    Raises:
        ValidationError: a row index is out of range (CPU; on a GPU that row becomes NaN).
    """
    if hidden.is_cuda:
        return native_cuda.steer(hidden, rows, bias, left, right)
    dtype = hidden.dtype
    wide = compute_dtype(hidden, bias, left, right)
    x = hidden if wide is torch.float32 else hidden.to(wide)
    if x.stride(1) != 1:
        x = x.contiguous()
    n_rows, width = x.shape
    bias, left, right = _table(bias, wide), _table(left, wide), _table(right, wide)
    table = left if bias is None else bias
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    try:
        _module().steer(
            _DTYPE_CODES[x.dtype],
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
        )
    except IndexError as error:
        raise ValidationError(str(error)) from None
    return out if out.dtype is dtype else out.to(dtype)


def _table(table: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if table is None or (table.dtype is dtype and table.is_contiguous()):
        return table
    return table.to(dtype).contiguous()
