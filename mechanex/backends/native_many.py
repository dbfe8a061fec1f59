"""The general steer op by the compiled kernels: several edits a row, strengths, gates."""

from __future__ import annotations

import torch
from torch import Tensor

from mechanex.errors import ValidationError
from mechanex.ops.gate import Gate

from . import native, native_cuda
from .eager import many_dtype

__all__ = ["refuses_steer_many", "steer_many"]


def refuses_steer_many(
    hidden: Tensor,
    rows: Tensor | None,
    strength: Tensor | None,
    bias: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    gate: Gate | None,
) -> str | None:
    """Why the kernel can't take these arguments, or None."""
    reason = native.refuses_steer(hidden, rows, bias, left, right)
    if reason is not None:
        return reason
    if any(
        t is not None and t.is_neg()
        for t in (strength, *((gate.weight, gate.offset) if gate is not None else ()))
    ):
        return native._NEGATED
    if hidden.is_cuda and hidden.dtype.itemsize == 2 and hidden.shape[1] > native_cuda.MANY_WIDTH:
        return f"the width is {hidden.shape[1]}, several edits of a half type take at most {native_cuda.MANY_WIDTH}"
    return None


def steer_many(
    hidden: Tensor,
    rows: Tensor | None,
    strength: Tensor | None,
    bias: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    gate: Gate | None,
) -> Tensor:
    """Several edits of a row in order; see :func:`mechanex.backends.reference.steer_many`.

    Raises:
        ValidationError: a row index is out of range (CPU; on a GPU that row becomes NaN).
    """
    dtype, on_gpu = hidden.dtype, hidden.is_cuda
    wide = many_dtype(hidden, strength, bias, left, right, gate)
    x = hidden if wide is torch.float32 else hidden.to(wide)
    if x.stride(1) != 1:
        x = x.contiguous()
    n_rows, width = x.shape
    weight = None if gate is None else gate.weight
    # On a GPU, tables of the rows' own half type are read as they are; converting them would cost a launch each.
    tables = [bias, left, right, weight]
    table_dtype = wide
    if on_gpu and wide is not x.dtype and all(t is None or t.dtype is x.dtype for t in tables):
        table_dtype = x.dtype
    bias_, left, right, weight = (native._table(t, table_dtype) for t in tables)
    offset = None if gate is None else native._table(gate.offset, wide)
    kinds = None if gate is None else gate.kinds.contiguous()
    strength = native._table(strength, wide)
    rows = None if rows is None else rows.contiguous()
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    dtypes = native._DTYPE_CODES[x.dtype], native._DTYPE_CODES[table_dtype]
    arguments = (
        n_rows,
        width,
        x.data_ptr(),
        x.stride(0),
        out.data_ptr(),
        width,
        0 if rows is None else rows.data_ptr(),
        1 if rows is None else rows.shape[1],
        *(0 if t is None else t.data_ptr() for t in (strength, bias_, left, right, kinds, weight, offset)),
        bias.shape[0],
        0 if left is None else left.shape[1],
    )
    if on_gpu:
        device = x.get_device()
        native_cuda._module().steer_many(*dtypes, *arguments, device, native_cuda._stream_getter()(device))
    else:
        try:
            native._module().steer_many(dtypes[0], *arguments)
        except IndexError as error:
            raise ValidationError(str(error)) from None
    return out if out.dtype is dtype else out.to(dtype)
