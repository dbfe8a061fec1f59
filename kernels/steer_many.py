"""The general steer op in Triton: a row's edits one after another, with strengths and gates.

A program holds one whole row in registers from the first edit to the last: it is read and written once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mechanex.ops.edits import StackedEdits
from mechanex.ops.gate import NONE, NORM, RELU, SIGMOID, STEP

from .convert import narrow, widen
from .launch import IN_TRITON, Launcher, adjacent, block_for, contiguous, current

__all__ = ["steer_many"]

_NONE, _STEP, _SIGMOID, _RELU, _NORM = (tl.constexpr(code) for code in (NONE, STEP, SIGMOID, RELU, NORM))


@triton.jit
def _opening(kind, q):
    sigmoid = 1.0 / (1.0 + tl.exp(-q))
    open = tl.where(kind == _STEP, tl.where(q > 0, 1.0, 0.0), float("nan"))
    open = tl.where(kind == _SIGMOID, sigmoid, open)
    return tl.where(kind == _RELU, tl.where(q <= 0, 0.0, q), open).to(q.dtype)


@triton.jit
def _one_edit(
    x,
    amount,
    edit,
    column,
    bias,
    left,
    right,
    kinds,
    weight,
    offset,
    width,
    RANK: tl.constexpr,
    WIDE: tl.constexpr,
):  # x [columns]; amount and edit scalars
    inside = column < width
    at = edit.to(tl.int64)
    change = tl.load(bias + at * width + column, mask=inside, other=0.0).to(WIDE)
    if left is not None:
        for r in tl.range(RANK, loop_unroll_factor=4):
            factor = (at * RANK + r) * width + column
            coordinate = tl.sum(x * tl.load(right + factor, mask=inside, other=0.0).to(WIDE), axis=0)
            change += coordinate * tl.load(left + factor, mask=inside, other=0.0).to(WIDE)
    if kinds is None:
        y = x + amount * change
    else:
        kind = tl.load(kinds + at)
        if (kind != _NONE) & (kind != _NORM):
            w = tl.load(weight + at * width + column, mask=inside, other=0.0).to(WIDE)
            amount *= _opening(kind, tl.sum(x * w, axis=0) + tl.load(offset + at).to(WIDE))
        y = x + amount * change
        if kind == _NORM:
            after = tl.sqrt(tl.sum(y * y, axis=0))
            before = tl.sqrt(tl.sum(x * x, axis=0))
            y *= tl.where(after == 0, 1.0, before / tl.where(after == 0, 1.0, after)).to(WIDE)
    return y


@triton.jit(do_not_specialize=["n_edits"])
def _steer_many_kernel(
    hidden,
    out,
    rows,
    strength,
    bias,
    left,
    right,
    kinds,
    weight,
    offset,
    n_edits,
    width,
    hidden_stride,
    EDITS: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_COLUMNS)
    inside = column < width
    x = tl.load(hidden + t * hidden_stride + column, mask=inside, other=0.0)
    y = widen(x, WIDE)
    edited = 0
    outside = 0
    for i in tl.range(EDITS):
        edit = tl.zeros([], tl.int32) if rows is None else tl.load(rows + t * EDITS + i)
        amount = tl.full([], 1.0, WIDE)
        if strength is not None:
            amount = tl.load(strength + t * EDITS + i).to(WIDE)
        if (edit >= 0) & (edit < n_edits):
            y = _one_edit(
                y, amount, edit, column, bias, left, right, kinds, weight, offset, width, RANK, WIDE
            )
        edited += (edit != -1).to(tl.int32)
        outside += ((edit < -1) | (edit >= n_edits)).to(tl.int32)
    y = tl.where(outside > 0, float("nan"), y)
    # The loaded bits themselves: a conversion there and back would change some NaN.
    result = tl.where(edited == 0, x, narrow(y, out.dtype.element_ty))
    tl.store(out + t * width + column, result, mask=inside)


_launch = Launcher(_steer_many_kernel)


def steer_many(hidden: Tensor, rows: Tensor | None, strength: Tensor | None, edits: StackedEdits) -> Tensor:
    """Several edits of a row in order; see :func:`mechanex.backends.reference.steer_many`.

    Rows with an index outside ``[-1, K)`` come back as NaN.
    """
    n_rows, width = hidden.shape
    out = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    if out.numel() == 0:
        return out
    wide = edits.dtype_for(hidden, strength)
    # A row is held whole whatever the rank.
    block = block_for(1, width, 1, wide)
    hidden = adjacent(hidden)
    with current(hidden):
        _launch(
            (n_rows, 1, 1),
            hidden.device,
            (
                hidden,
                out,
                contiguous(rows),
                contiguous(strength),
                *map(contiguous, edits.tensors),
                edits.bias.shape[0],
                width,
                hidden.stride(0),
            ),
            (1 if rows is None else rows.shape[1], edits.rank, block.columns, IN_TRITON[wide]),
            block.warps,
        )
    return out
