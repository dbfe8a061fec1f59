"""The steer op in Triton: ``y = x + b + Lᵀ(R x)``, every row with its own edit.

A program holds whole rows in registers, so that a row is read once whatever the rank, and several rows at a
time where there are many, so that neighbours with the same edit share one read of its table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mechanex.backends.arithmetic import compute_dtype

from .convert import narrow, widen
from .launch import (
    IN_TRITON,
    MANY_ROWS,
    Block,
    Launcher,
    adjacent,
    block_for,
    contiguous,
    current,
    divided_up,
    is_watched,
)

__all__ = ["direct", "steer"]


@triton.jit
def _edit(
    x,
    edit,
    column,
    bias,
    left,
    right,
    width,
    n_edits,
    RANK: tl.constexpr,
    WIDE: tl.constexpr,
    UNROLL: tl.constexpr,
):  # x [rows, columns]; edit [rows or 1, 1]
    held = (edit >= 0) & (edit < n_edits) & (column < width)[None, :]
    edit = edit.to(tl.int64)
    wide = widen(x, WIDE)
    y = wide
    if bias is not None:
        y += tl.load(bias + edit * width + column[None, :], mask=held, other=0.0).to(WIDE)
    if left is not None:
        for r in tl.range(RANK, loop_unroll_factor=UNROLL):
            at = (edit * RANK + r) * width + column[None, :]
            coordinate = tl.sum(wide * tl.load(right + at, mask=held, other=0.0).to(WIDE), axis=1)
            y += coordinate[:, None] * tl.load(left + at, mask=held, other=0.0).to(WIDE)
    return y


@triton.jit(do_not_specialize=["n_rows", "n_edits"])
def _steer_kernel(
    hidden,
    out,
    rows,
    bias,
    left,
    right,
    n_rows,
    n_edits,
    width,
    hidden_stride,
    rows_stride,
    RANK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK_ROWS
    t = start + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inside = (t < n_rows)[:, None] & (column < width)[None, :]
    x = tl.load(hidden + t[:, None] * hidden_stride + column[None, :], mask=inside, other=0.0)
    if rows is None:
        only = tl.zeros([1, 1], tl.int32)
        y = _edit(x, only, column, bias, left, right, width, n_edits, RANK, WIDE, 4)
        result = narrow(y, out.dtype.element_ty)
    else:
        shared = tl.load(rows + start * rows_stride)
        edit = tl.load(rows + t * rows_stride, mask=t < n_rows, other=shared)[:, None]
        if BLOCK_ROWS == 1:
            y = _edit(x, edit, column, bias, left, right, width, n_edits, RANK, WIDE, 4)
        elif tl.max(tl.max(edit, axis=1), axis=0) == tl.min(tl.min(edit, axis=1), axis=0):
            # One read of the table serves the rows.
            one = tl.zeros([1, 1], tl.int32) + shared
            y = _edit(x, one, column, bias, left, right, width, n_edits, RANK, WIDE, 4)
        else:
            y = _edit(x, edit, column, bias, left, right, width, n_edits, RANK, WIDE, 1)
        y = tl.where((edit >= 0) & (edit < n_edits), y, float("nan"))
        # The loaded bits themselves: a conversion there and back would change some NaN.
        result = tl.where(edit == -1, x, narrow(y, out.dtype.element_ty))
    tl.store(out + t[:, None] * width + column[None, :], result, mask=inside)


_launch = Launcher(_steer_kernel)


def steer(
    hidden: Tensor,
    rows: Tensor | None,
    bias: Tensor | None,
    left: Tensor | None,
    right: Tensor | None,
    *,
    block: Block | None = None,
) -> Tensor:
    """``y = x + b + Lᵀ(R x)`` per row; shapes and meaning as in :func:`mechanex.backends.reference.steer`.

    Rows whose index is outside ``[-1, K)`` come back as NaN.

    Args:
        hidden, rows, bias, left, right: the op's arguments, checked.
        block: what a program works on; None: by the table in ``launch.py``.
    """
    hidden = adjacent(hidden)
    out = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    if out.numel():
        with current(hidden):
            _launch(
                *_described(hidden, out, rows, contiguous(bias), contiguous(left), contiguous(right), block)
            )
    return out


def _described(
    hidden: Tensor,
    out: Tensor,
    rows: Tensor | None,
    bias: Tensor | None,
    left: Tensor | None,
    right: Tensor | None,
    block: Block | None = None,
) -> tuple[Any, ...]:
    """One launch, as :class:`Launcher` takes it; `csrc/replay.h` knows the order of the kernel's arguments too."""
    n_rows, width = hidden.shape
    rank = 0 if left is None else left.shape[1]
    table = left if bias is None else bias
    wide = compute_dtype(hidden, bias, left, right)
    block = block or block_for(n_rows, width, rank, wide)
    return (
        (divided_up(n_rows, block.rows), divided_up(width, block.columns), 1),
        hidden.device,
        (
            hidden,
            out,
            rows,
            bias,
            left,
            right,
            n_rows,
            0 if table is None else table.shape[0],
            width,
            hidden.stride(0),
            0 if rows is None else rows.stride(0),
        ),
        (rank, block.rows, block.columns, IN_TRITON[wide]),
        block.warps,
    )


def direct(
    replay: Callable[..., Tensor | bytes | None], refuses: Callable[..., str | None], device_type: int
) -> Callable[..., Tensor | None]:
    """The op for plain tensors as they are given: the launch of a former call like it, made again by compiled code.

    Args:
        replay: ``steer_replayed`` of the compiled module.
        refuses: why the kernel can't take the op's arguments, or None.
        device_type: DLPack's number of the devices that are served.

    Returns:
        Takes the op's arguments [..., d] and strengths, checked or not; gives None for what isn't plain.
    """
    launches: dict[bytes, tuple[Any, ...]] = {}
    several = torch.cuda.device_count() > 1

    def run(
        hidden: Tensor,
        rows: Tensor | None,
        bias: Tensor,
        left: Tensor | None,
        right: Tensor | None,
        strength: Tensor | None,
    ) -> Tensor | None:
        if strength is not None or is_watched():
            return None
        if several and hidden.get_device() != torch.cuda.current_device():
            return None
        out = replay(hidden, rows, bias, left, right, launches, device_type, MANY_ROWS)
        return out if type(out) is not bytes else first(out, hidden, rows, bias, left, right)

    def first(
        key: bytes,
        hidden: Tensor,
        rows: Tensor | None,
        bias: Tensor,
        left: Tensor | None,
        right: Tensor | None,
    ) -> Tensor | None:
        flat = hidden.reshape(-1, hidden.shape[-1])
        # One row's index may have any stride, and launches that are made again say 1.
        rows = None if rows is None else rows.as_strided((flat.shape[0],), (1,))
        if refuses(flat, rows, bias, left, right) is not None:
            return None
        out = torch.empty_like(flat)
        grid, device, arguments, constants, warps = _described(flat, out, rows, bias, left, right)
        start = _launch(grid, device, arguments, constants, warps)
        if start is not None and start.recorded is not None:
            launch, fixed, nested = start.recorded
            launches[key] = launch, constants[1], grid[1], fixed, constants, nested
        return out.view(hidden.shape)

    return run
