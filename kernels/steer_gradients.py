"""The gradients of the steer op's tables in Triton: sums over the rows of each edit, twice the same bits.

Rows are sorted by edit and cut into chunks of equal size; every (chunk, edit) pair leaves a partial sum, and a
second kernel adds an edit's partial sums in their order. No atomics, and work that is spread evenly however many
rows an edit has.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from mechanex.backends.arithmetic import compute_dtype

from .convert import narrow
from .launch import IN_TRITON, MAX_RANK, OPTIONS, adjacent, block_for, contiguous, current, divided_up

__all__ = ["gradients"]

# Rows per partial sum: up to this many rows, this chunk.
_CHUNKS = ((2048, 32), (16384, 128), (1 << 62, 512))
# Partial sums: rank up to, rows at a time, ranks at a time.
_SUM_BLOCKS = ((1, 16, 1), (2, 8, 2), (MAX_RANK, 4, 4))


@triton.jit(do_not_specialize=["n_rows", "n_edits"])
def _project_kernel(
    vectors,
    rows,
    table,
    out,
    n_rows,
    n_edits,
    width,
    vectors_stride,
    rows_stride,
    RANK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_COLUMNS)
    inside = (t < n_rows)[:, None] & (column < width)[None, :]
    at = t[:, None] * vectors_stride + column[None, :]
    wide = tl.load(vectors + at, mask=inside, other=0.0).to(WIDE)
    if rows is None:
        edit = tl.zeros([1, 1], tl.int64)
    else:
        edit = tl.load(rows + t * rows_stride, mask=t < n_rows, other=-1)[:, None].to(tl.int64)
    held = (edit >= 0) & (edit < n_edits) & (column < width)[None, :]
    for r in tl.range(RANK, loop_unroll_factor=4):
        at = (edit * RANK + r) * width + column[None, :]
        coordinate = tl.sum(wide * tl.load(table + at, mask=held, other=0.0).to(WIDE), axis=1)
        tl.store(out + t * RANK + r, coordinate, mask=t < n_rows)


@triton.jit(do_not_specialize=["n_rows", "n_edits"])
def _partial_sums_kernel(
    vectors,
    coordinates,
    edits,
    order,
    starts,
    partial,
    n_rows,
    n_edits,
    width,
    vectors_stride,
    RANK: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_RANKS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
):
    chunk = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    rank = tl.program_id(2) * BLOCK_RANKS + tl.arange(0, BLOCK_RANKS)
    low = chunk * CHUNK
    high = tl.minimum(low + CHUNK, n_rows)
    first = 0
    last = 0
    if edits is not None:
        first = tl.maximum(tl.load(edits + low), 0)
        last = tl.minimum(tl.load(edits + high - 1), n_edits - 1)
    for k in range(first, last + 1):
        begin = low
        end = high
        if edits is not None:
            begin = tl.maximum(low, tl.load(starts + k))
            end = tl.minimum(high, tl.load(starts + k + 1))
        total = tl.zeros([BLOCK_RANKS, BLOCK_COLUMNS], WIDE)
        for position in range(begin, end, BLOCK_ROWS):
            place = position + tl.arange(0, BLOCK_ROWS)
            live = (place < end)[:, None]
            t = place.to(tl.int64)[:, None]
            if edits is not None:
                t = tl.load(order + place[:, None], mask=live, other=0)
            at = t * vectors_stride + column[None, :]
            wide = tl.load(vectors + at, mask=live & (column < width)[None, :], other=0.0).to(WIDE)
            if coordinates is None:
                total += tl.sum(wide, axis=0)[None, :]
            else:
                own = tl.load(
                    coordinates + t * RANK + rank[None, :], mask=live & (rank < RANK)[None, :], other=0.0
                )
                total += tl.sum(own[:, :, None] * wide[:, None, :], axis=0)
        if begin < end:
            # From one pair to the next either the chunk or the edit grows, so their sum numbers the pairs.
            pair = (chunk + k).to(tl.int64)
            at = (pair * RANK + rank)[:, None] * width + column[None, :]
            tl.store(partial + at, total, mask=(rank < RANK)[:, None] & (column < width)[None, :])


@triton.jit(do_not_specialize=["n_rows"])
def _add_partial_sums_kernel(
    partial,
    starts,
    out,
    n_rows,
    size,
    CHUNK: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    k = tl.program_id(0).to(tl.int64)
    element = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (element < size)[None, :]
    if starts is None:
        begin = 0
        end = n_rows
    else:
        begin = tl.load(starts + k)
        end = tl.load(starts + k + 1)
    first = begin // CHUNK
    stop = tl.where(end > begin, (end + CHUNK - 1) // CHUNK, first)
    total = tl.zeros([BLOCK], WIDE)
    for chunk in range(first, stop, BLOCK_CHUNKS):
        chunks = chunk + tl.arange(0, BLOCK_CHUNKS)
        at = (chunks + k)[:, None] * size + element[None, :]
        total += tl.sum(tl.load(partial + at, mask=(chunks < stop)[:, None] & inside, other=0.0), axis=0)
    tl.store(out + k * size + element, narrow(total, out.dtype.element_ty), mask=element < size)


def gradients(
    grad: Tensor,
    hidden: Tensor | None,
    rows: Tensor | None,
    bias: Tensor | None,
    left: Tensor | None,
    right: Tensor | None,
    needed: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of :func:`steer` for ``bias``, ``left`` and ``right``; that for ``hidden`` is an edit itself.

    Args:
        grad: ``[T, d]``, the output's gradient.
        hidden: ``[T, d]``, or None for rank 0.
        rows, bias, left, right: as in :func:`steer`.
        needed: which of the three to compute.

    Returns:
        Each in the shape and dtype of its table, or None where not needed.
    """
    grad = adjacent(grad)
    wide = compute_dtype(grad, hidden, bias, left, right)
    segments = None if rows is None else _Segments.of(rows, bias if bias is not None else left)
    d_bias = d_left = d_right = None
    with current(grad):
        if needed[0] and bias is not None:
            d_bias = _sums(grad, None, segments, bias[:, None], wide)[:, 0]
        if hidden is not None and left is not None and right is not None:
            hidden = adjacent(hidden)
            if needed[1]:
                d_left = _sums(grad, _coordinates(hidden, rows, right, wide), segments, left, wide)
            if needed[2]:
                d_right = _sums(hidden, _coordinates(grad, rows, left, wide), segments, right, wide)
    return d_bias, d_left, d_right


@dataclass(frozen=True)
class _Segments:
    """Rows by edit: edits ``[T]`` ascending, the row that each comes from, where edit k starts ``[K + 1]``."""

    edits: Tensor
    order: Tensor
    starts: Tensor

    @classmethod
    def of(cls, rows: Tensor, table: Tensor | None) -> _Segments:
        assert table is not None, "an edit has a bias or a rank"
        edits, order = torch.sort(rows, stable=True)
        bounds = torch.arange(table.shape[0] + 1, dtype=rows.dtype, device=rows.device)
        return cls(edits, order, torch.searchsorted(edits, bounds, out_int32=True))


def _coordinates(vectors: Tensor, rows: Tensor | None, table: Tensor, wide: torch.dtype) -> Tensor:
    """``table`` times each row's vector: ``[T, r]``."""
    n_rows, width = vectors.shape
    n_edits, rank = table.shape[:2]
    out = vectors.new_empty(n_rows, rank, dtype=wide)
    if out.numel() == 0 or width == 0:
        return out
    block = block_for(n_rows, width, rank, wide)
    _project_kernel[(divided_up(n_rows, block.rows),)](
        vectors,
        rows,
        contiguous(table),
        out,
        n_rows,
        n_edits,
        width,
        vectors.stride(0),
        0 if rows is None else rows.stride(0),
        rank,
        block.rows,
        block.columns,
        IN_TRITON[wide],
        num_warps=block.warps,
        **OPTIONS,
    )
    return out


def _sums(
    vectors: Tensor, coordinates: Tensor | None, segments: _Segments | None, like: Tensor, wide: torch.dtype
) -> Tensor:
    """Sum of ``coordinate ⊗ vector`` over the rows of each edit, ``[K, r, d]`` as ``like``."""
    n_rows, width = vectors.shape
    n_edits, rank = like.shape[:2]
    out = torch.empty_like(like, memory_format=torch.contiguous_format)
    if out.numel() == 0 or n_rows == 0:
        return out.zero_()
    chunk = next(size for most, size in _CHUNKS if n_rows <= most)
    n_chunks = divided_up(n_rows, chunk)
    partial = vectors.new_empty(n_chunks + n_edits, rank, width, dtype=wide)
    block_rows, block_ranks = next(sizes for most, *sizes in _SUM_BLOCKS if rank <= most)
    columns = min(triton.next_power_of_2(width), 256)
    _partial_sums_kernel[n_chunks, divided_up(width, columns), divided_up(rank, block_ranks)](
        vectors,
        coordinates,
        None if segments is None else segments.edits,
        None if segments is None else segments.order,
        None if segments is None else segments.starts,
        partial,
        n_rows,
        n_edits,
        width,
        vectors.stride(0),
        rank,
        chunk,
        block_rows,
        block_ranks,
        columns,
        IN_TRITON[wide],
        num_warps=4,
        **OPTIONS,
    )
    size = rank * width
    elements = min(triton.next_power_of_2(size), 256)
    _add_partial_sums_kernel[n_edits, divided_up(size, elements)](
        partial,
        None if segments is None else segments.starts,
        out,
        n_rows,
        size,
        chunk,
        8,
        elements,
        IN_TRITON[wide],
        num_warps=4,
        **OPTIONS,
    )
    return out
