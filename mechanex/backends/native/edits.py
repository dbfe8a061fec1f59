"""Edits by the compiled kernels, on the CPU and on CUDA.

On a GPU nothing waits for the device: a row whose index is out of range becomes NaN, and an error of a running kernel
shows up where the stream is next waited for. The CPU's kernels raise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mechanex.errors import ValidationError
from mechanex.ops.edits import StackedEdits

from ..arithmetic import compute_dtype
from ..backend import NEGATED, is_negated
from . import modules
from .modules import DTYPE_CODES, address, on_stream, table

__all__ = [
    "MANY_WIDTH",
    "TORCH_RANK",
    "TORCH_TABLE",
    "declines_steer",
    "on_gpu",
    "refuses_steer",
    "refuses_steer_many",
    "steer",
    "steer_many",
]

# The kernel keeps a row's coordinates on its stack; beyond this, matrix products are faster anyway.
_MAX_RANK = 64
# Measured against plain torch on two CPU cores with AVX-512 (benchmarks/test_steer.py, the crossings): one edit of a
# higher rank is faster as matrix products, and on a single row so is one whose factors hold more numbers than this.
TORCH_RANK = 48
TORCH_TABLE = 1 << 17
# Widest row of a half type that takes several edits on a GPU: it waits in a block's shared memory, float32.
MANY_WIDTH = 24_000


def refuses_steer(
    hidden: Tensor, rows: Tensor | None, bias: Tensor | None, left: Tensor | None, right: Tensor | None
) -> str | None:
    """Why the kernel can't take these arguments, or None."""
    if left is not None and left.shape[1] > _MAX_RANK:
        return f"the rank is {left.shape[1]}, the kernels take at most {_MAX_RANK}"
    return NEGATED if is_negated(hidden, bias, left, right) else None


def declines_steer(
    hidden: Tensor, rows: Tensor | None, bias: Tensor | None, left: Tensor | None, right: Tensor | None
) -> str | None:
    """Why ``auto`` leaves these arguments to plain torch, or None."""
    if rows is None and left is None and bias is not None and bias.dtype is hidden.dtype:
        return "one vector added to every row is a plain addition"
    if left is not None:
        n_edits, rank, width = left.shape
        many = rank > TORCH_RANK or (rank * width > TORCH_TABLE and hidden.shape[0] == 1)
        if n_edits == 1 and many:
            return "one edit of high rank is two matrix products"
    return None


def steer(
    hidden: Tensor, rows: Tensor | None, bias: Tensor | None, left: Tensor | None, right: Tensor | None
) -> Tensor:
    """``y = x + b + Lᵀ(R x)`` per row; shapes and meaning as in :func:`mechanex.backends.reference.steer`.

    Raises:
        ValidationError: a row index is out of range (CPU).
        RuntimeError: CUDA refused the launch.
    """
    if hidden.is_cuda:
        return on_gpu("steer", hidden, rows, None, bias, left, right)
    wide = compute_dtype(hidden, bias, left, right)
    x = _widened(hidden, wide)
    bias, left, right = table(bias, wide), table(left, wide), table(right, wide)
    return _run("steer", x, hidden.dtype, wide, _given(rows, bias, left, right))


def on_gpu(
    op: str,
    hidden: Tensor,
    rows: Tensor | None,
    strength: Tensor | None,
    bias: Tensor | None,
    left: Tensor | None,
    right: Tensor | None,
) -> Tensor:
    """One edit a row by an op of the compiled CUDA module.

    Args:
        op: its name: ``steer``, or one that takes the same arguments and falls back on it.
        hidden, rows, bias, left, right: as for :func:`steer`.
        strength: ``[T]``, or None.
    """
    wide = compute_dtype(hidden, strength, bias, left, right)
    x = _widened(hidden, wide)
    stored = _stored(x, wide, bias, left, right)
    # Named until the kernel has run: what is converted here lives as long.
    strength, bias, left, right = (
        table(t, dtype) for t, dtype in ((strength, wide), (bias, stored), (left, stored), (right, stored))
    )
    at, stride, *edits = _given(rows, bias, left, right)
    return _run(op, x, hidden.dtype, stored, (at, stride, address(strength), *edits))


def _widened(hidden: Tensor, wide: torch.dtype) -> Tensor:
    """The rows as a kernel whose arithmetic is in ``wide`` reads them."""
    x = hidden if wide is torch.float32 else hidden.to(wide)
    return x if x.stride(1) == 1 else x.contiguous()


def _given(
    rows: Tensor | None, bias: Tensor | None, left: Tensor | None, right: Tensor | None
) -> tuple[int, ...]:
    """What the kernels of ``steer`` are told of rows and tables; the caller keeps those alive."""
    edits = left if bias is None else bias
    return (
        0 if rows is None else rows.data_ptr(),
        0 if rows is None else rows.stride(0),
        0 if bias is None else bias.data_ptr(),
        0 if left is None else left.data_ptr(),
        0 if right is None else right.data_ptr(),
        0 if edits is None else edits.shape[0],
        0 if left is None else left.shape[1],
    )


def refuses_steer_many(
    hidden: Tensor, rows: Tensor | None, strength: Tensor | None, edits: StackedEdits
) -> str | None:
    """Why the kernel can't take these arguments, or None."""
    bias, left, right, kinds, weight, offset = edits.tensors
    reason = refuses_steer(hidden, rows, bias, left, right)
    if reason is not None:
        return reason
    if is_negated(strength, weight, offset):
        return NEGATED
    is_long = hidden.is_cuda and hidden.dtype.itemsize == 2 and hidden.shape[1] > MANY_WIDTH
    if is_long and not _is_one_edit(rows, kinds):
        return f"the width is {hidden.shape[1]}, several edits and gates of a half type take at most {MANY_WIDTH}"
    return None


def _is_one_edit(rows: Tensor | None, kinds: Tensor | None) -> bool:
    """Whether the kernels of one edit do all that is asked for."""
    return kinds is None and (rows is None or rows.shape[1] == 1)


def steer_many(
    hidden: Tensor,
    rows: Tensor | None,
    strength: Tensor | None,
    edits: StackedEdits,
    *,
    one_edit: str = "steer",
) -> Tensor:
    """Several edits of a row in order; see :func:`mechanex.backends.reference.steer_many`.

    Args:
        hidden, rows, strength, edits: as there.
        one_edit: what does one edit a row without gates on a GPU, as for :func:`on_gpu`.

    Raises:
        ValidationError, RuntimeError: as :func:`steer`.
    """
    bias, left, right, kinds, weight, offset = edits.tensors
    if hidden.is_cuda and _is_one_edit(rows, kinds):
        own, amounts = (None if t is None else t.squeeze(1) for t in (rows, strength))
        return on_gpu(one_edit, hidden, own, amounts, bias, left, right)
    wide = edits.dtype_for(hidden, strength)
    x = _widened(hidden, wide)
    stored = _stored(x, wide, bias, left, right, weight) if x.is_cuda else wide
    # Named until the kernel has run: what is converted here lives as long.
    kept = (
        None if rows is None else rows.contiguous(),
        table(strength, wide),
        *(table(t, stored) for t in (bias, left, right)),
        None if kinds is None else kinds.contiguous(),
        table(weight, stored),
        table(offset, wide),
    )
    at, *addresses = map(address, kept)
    given = (at, 1 if rows is None else rows.shape[1], *addresses, edits.bias.shape[0], edits.rank)
    return _run("steer_many", x, hidden.dtype, stored, given)


def _stored(x: Tensor, wide: torch.dtype, *tables: Tensor | None) -> torch.dtype:
    """The dtype in which a kernel on a GPU reads edits."""
    # Edits of the rows' own half type are read as they are: converting them would cost a launch each.
    return x.dtype if all(t is None or t.dtype is x.dtype for t in tables) else wide


def _run(op: str, x: Tensor, dtype: torch.dtype, stored: torch.dtype, given: tuple[int, ...]) -> Tensor:
    """What an op of the compiled module for the rows' device makes of them.

    Args:
        op: its name.
        x: the rows, ``[T, d]``.
        dtype: of the result.
        stored: the dtype of the edits, which the CPU's kernels read in that of the arithmetic.
        given: addresses, strides and sizes of all but the rows and the result.
    """
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    n_rows, width = x.shape
    rows = (n_rows, width, x.data_ptr(), x.stride(0), out.data_ptr(), width)
    code = DTYPE_CODES[x.dtype]
    if x.is_cuda:
        module = modules.cuda()
        call = (code, DTYPE_CODES[stored], *rows, *given, *on_stream(x))
        if getattr(module, op)(*call) is False:
            module.steer(*call)
    else:
        try:
            getattr(modules.cpu(), op)(code, *rows, *given)
        except IndexError as error:
            raise ValidationError(str(error)) from None
    return out if out.dtype is dtype else out.to(dtype)
