"""The completion_logprob op in Triton: products with the unembedding, their log-sum-exp and the target's logit, fused.

A program owns a block of rows and walks a stretch of the vocabulary; logits live in registers only. The stretches
are short enough that a few rows fill a GPU, and a second kernel joins what they leave, in their order: twice the
same bits. The target's logit stays out of the sum over the others, so that a log-probability near zero keeps its
digits: ``log p = -log(1 + sum of exp(other - target))``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mechanex.ops.head import Head

from .convert import _INTERPRETED, widen
from .launch import OPTIONS, adjacent, contiguous, current, divided_up

__all__ = ["CANDIDATES", "MINUS_INFINITY", "Tile", "log1p", "logprob", "tanh", "tile_for"]

MINUS_INFINITY = tl.constexpr(float("-inf"))
# Programs that fill any GPU several times over.
_PROGRAMS = 1024
# Row blocks that run side by side, so that they share reads of the vocabulary and of each other's rows.
_GROUP = 16


@dataclass(frozen=True)
class Tile:
    """What one program works on at a time.

    Attributes:
        rows: rows, a power of two from 16.
        columns: entries of the vocabulary, likewise.
        width: elements of the rows that a step multiplies, likewise.
        warps: warps that share the work.
        stages: steps whose operands are on their way at the same time.
        persistent: as many programs as there are multiprocessors, each with one long stretch of the vocabulary in which
            the next block's operands are on their way while this one's logits are reduced (Triton 3.3).
        described: operands are fetched by descriptions of hidden states and weights, where their layout allows it:
            from capability 9.0 on without addresses and masks in registers (Triton 3.4).
    """

    rows: int
    columns: int
    width: int
    warps: int
    stages: int
    persistent: bool = False
    described: bool = False

    def shared_bytes(self, element: int, stages: int) -> int:
        """Shared memory for the operands of so many steps, of elements of so many bytes."""
        return (self.rows + self.columns) * self.width * element * stages


# Up to this many rows, the tile. Few rows wait for the vocabulary to be read: long steps, many on their way. Many
# rows wait for the tensor cores: twice the columns would spill registers in what follows the products. All fit the
# 99 KiB of shared memory that the smallest GPUs from capability 8.0 on have.
_HALF_TILES = (
    (16, Tile(16, 64, 128, 4, 4)),
    (32, Tile(32, 128, 64, 4, 4)),
    (64, Tile(64, 128, 64, 4, 4)),
    (1 << 62, Tile(128, 128, 64, 8, 3)),
)
# Larger or longer-lived tiles than the table's, for benchmarks/gpu/logprob.py to measure from 256 rows on. None has run
# on a GPU.
CANDIDATES = (
    Tile(128, 128, 64, 8, 3, persistent=True),
    Tile(128, 128, 128, 8, 3),
    Tile(64, 256, 64, 4, 4),
    Tile(128, 256, 64, 8, 3),
    Tile(128, 256, 64, 8, 4),
    Tile(128, 256, 64, 8, 3, persistent=True),
    Tile(256, 128, 64, 8, 3),
    Tile(256, 128, 64, 8, 3, persistent=True),
    Tile(128, 128, 64, 8, 4, described=True),
    Tile(128, 256, 64, 8, 3, described=True),
    Tile(128, 256, 64, 8, 4, described=True),
    Tile(128, 256, 64, 8, 3, persistent=True, described=True),
)
# Without tensor cores every thread holds the operands of its sums for a whole step: short steps.
_FLOAT_TILES = (
    (16, Tile(16, 64, 32, 4, 3)),
    (1 << 62, Tile(64, 128, 16, 8, 4)),
)


def tile_for(n_rows: int, dtype: torch.dtype) -> Tile:
    """The entry of the table for so many rows of ``dtype``."""
    table = _FLOAT_TILES if dtype is torch.float32 else _HALF_TILES
    return next(tile for most, tile in table if n_rows <= most)


def _stages_for(tile: Tile, hidden: Tensor) -> int:
    """The tile's stages, fewer where the device's shared memory holds fewer."""
    stages = tile.stages
    if hidden.device.type == "cuda":
        properties = torch.cuda.get_device_properties(hidden.device)
        limit = getattr(properties, "shared_memory_per_block_optin", 48 * 1024)
        while stages > 1 and tile.shared_bytes(hidden.element_size(), stages) > limit:
            stages -= 1
    return stages


def _programs_for(tile: Tile, hidden: Tensor, row_blocks: int) -> int:
    """Programs among which the blocks of logits are shared."""
    if not tile.persistent or hidden.device.type != "cuda":
        return _PROGRAMS
    processors: int = torch.cuda.get_device_properties(hidden.device).multi_processor_count
    return max(row_blocks, processors // row_blocks * row_blocks)


@triton.jit
def _place(program, n_row_blocks, n_columns, GROUP: tl.constexpr):
    """The row block and the column of a program, ``GROUP`` row blocks side by side along all columns."""
    group = program // (GROUP * n_columns)
    first = group * GROUP
    height = tl.minimum(n_row_blocks - first, GROUP)
    within = program % (GROUP * n_columns)
    return first + within % height, within // height


@triton.jit
def tanh(x, e):
    """The hyperbolic tangent of x, given ``e = exp(-2 |x|)``."""
    quotient = (1 - e) / (1 + e)
    quotient = tl.where(x < 0, -quotient, quotient)
    if x.dtype == tl.float64:
        return quotient
    # The quotient loses the digits of a small x, the series those of a large one.
    square = x * x
    series = x * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    return tl.where(tl.abs(x) < 0.3, series, quotient)


@triton.jit
def _known(target, n_vocab):
    """Targets as int32; -1 for those outside the vocabulary."""
    return tl.where((target >= 0) & (target < n_vocab), target, -1).to(tl.int32)


@triton.jit
def log1p(x):
    """``log(1 + x)`` for x in [0, 1]; the correction makes up for what the sum rounds away."""
    sum = 1 + x
    kept = sum - 1
    return tl.where(kept == 0, x, tl.log(sum) * (x / tl.where(kept == 0, 1.0, kept)))


@triton.jit
def _logits_tile(
    hidden,
    weight,
    bias,
    first_row,
    first_column,
    n_rows,
    n_vocab,
    width,
    hidden_stride,
    weight_stride,
    weight_step,
    scale,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    DESCRIBED: tl.constexpr,
):
    """Logits ``[rows, columns]`` in float32, before softcap and coldness."""
    row = first_row + tl.arange(0, BLOCK_ROWS)
    column = first_column + tl.arange(0, BLOCK_COLUMNS)
    products = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    if DESCRIBED:
        for start in range(0, width, BLOCK_WIDTH):
            left = hidden.load([first_row, start])
            right = weight.load([first_column, start]).T
            if _INTERPRETED:
                left = widen(left, tl.float32)
                right = widen(right, tl.float32)
            products = tl.dot(left, right, products, input_precision="ieee")
    else:
        products = _by_addresses(
            hidden,
            weight,
            products,
            row,
            column,
            n_rows,
            n_vocab,
            width,
            hidden_stride,
            weight_stride,
            weight_step,
            BLOCK_WIDTH,
        )
    if bias is not None:
        shift = tl.load(bias + column, mask=column < n_vocab, other=0.0)
        products += widen(shift, tl.float32)[None, :]
    return products * scale


@triton.jit
def _by_addresses(
    hidden,
    weight,
    products,
    row,
    column,
    n_rows,
    n_vocab,
    width,
    hidden_stride,
    weight_stride,
    weight_step,
    BLOCK_WIDTH: tl.constexpr,
):
    """Products of operands of any layout."""
    at = tl.arange(0, BLOCK_WIDTH)
    x = hidden + row[:, None].to(tl.int64) * hidden_stride + at[None, :]
    w = weight + column[None, :].to(tl.int64) * weight_stride + at[:, None].to(tl.int64) * weight_step
    advance = tl.full([], BLOCK_WIDTH, tl.int64) * weight_step
    row_inside = (row < n_rows)[:, None]
    column_inside = (column < n_vocab)[None, :]
    for start in range(0, width, BLOCK_WIDTH):
        left = tl.load(x, mask=row_inside & (at < width - start)[None, :], other=0.0)
        right = tl.load(w, mask=column_inside & (at < width - start)[:, None], other=0.0)
        if _INTERPRETED:
            left = widen(left, tl.float32)
            right = widen(right, tl.float32)
        products = tl.dot(left, right, products, input_precision="ieee")
        x += BLOCK_WIDTH
        w += advance
    return products


@triton.jit
def _fold_block(
    highest,
    sums,
    block,
    own,
    first_row,
    hidden,
    weight,
    bias,
    chosen,
    n_rows,
    n_vocab,
    width,
    hidden_stride,
    weight_stride,
    weight_step,
    scale,
    softcap,
    coldness,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    DESCRIBED: tl.constexpr,
):
    """The rows' running maximum and sum after a block of the vocabulary; stores the logits of targets in it."""
    row = first_row + tl.arange(0, BLOCK_ROWS)
    column = block * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    logits = _logits_tile(
        hidden,
        weight,
        bias,
        first_row,
        block * BLOCK_COLUMNS,
        n_rows,
        n_vocab,
        width,
        hidden_stride,
        weight_stride,
        weight_step,
        scale,
        BLOCK_ROWS,
        BLOCK_COLUMNS,
        BLOCK_WIDTH,
        DESCRIBED,
    )
    if softcap is not None:
        logits = logits / softcap
        logits = softcap * tanh(logits, tl.exp(-2 * tl.abs(logits)))
    logits *= coldness
    is_own = column[None, :] == own[:, None]
    here = (own >= block * BLOCK_COLUMNS) & (own < (block + 1) * BLOCK_COLUMNS)
    tl.store(chosen + row, tl.sum(tl.where(is_own, logits, 0.0), axis=1), mask=here)
    logits = tl.where(is_own | (column >= n_vocab)[None, :], MINUS_INFINITY, logits)
    higher = tl.maximum(highest, tl.max(logits, axis=1))
    # Where every logit is minus infinity, differences from it would be NaN.
    finite = tl.where(higher == MINUS_INFINITY, 0.0, higher)
    sums = sums * tl.exp(highest - finite) + tl.sum(tl.exp(logits - finite[:, None]), axis=1)
    return higher, sums


@triton.jit(do_not_specialize=["n_rows", "n_splits", "blocks_each"])
def _logprob_kernel(
    hidden,
    weight,
    bias,
    target,
    peak,
    total,
    chosen,
    n_rows,
    n_vocab,
    width,
    hidden_stride,
    weight_stride,
    weight_step,
    scale,
    softcap,
    coldness,
    n_splits,
    blocks_each,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    PERSISTENT: tl.constexpr,
    DESCRIBED: tl.constexpr,
):
    row_block, split = _place(tl.program_id(0), tl.cdiv(n_rows, BLOCK_ROWS), n_splits, GROUP)
    row = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    own = _known(tl.load(target + row, mask=row < n_rows, other=-1), n_vocab)
    highest = tl.full([BLOCK_ROWS], MINUS_INFINITY, tl.float32)
    sums = tl.zeros([BLOCK_ROWS], tl.float32)
    first = split * blocks_each
    last = tl.minimum(first + blocks_each, tl.cdiv(n_vocab, BLOCK_COLUMNS))
    if PERSISTENT:
        # One loop of both: its loads go on over the border between two blocks.
        for block in tl.range(first, last, flatten=True):
            highest, sums = _fold_block(
                highest,
                sums,
                block,
                own,
                row_block * BLOCK_ROWS,
                hidden,
                weight,
                bias,
                chosen,
                n_rows,
                n_vocab,
                width,
                hidden_stride,
                weight_stride,
                weight_step,
                scale,
                softcap,
                coldness,
                BLOCK_ROWS,
                BLOCK_COLUMNS,
                BLOCK_WIDTH,
                DESCRIBED,
            )
    else:
        for block in range(first, last):
            highest, sums = _fold_block(
                highest,
                sums,
                block,
                own,
                row_block * BLOCK_ROWS,
                hidden,
                weight,
                bias,
                chosen,
                n_rows,
                n_vocab,
                width,
                hidden_stride,
                weight_stride,
                weight_step,
                scale,
                softcap,
                coldness,
                BLOCK_ROWS,
                BLOCK_COLUMNS,
                BLOCK_WIDTH,
                DESCRIBED,
            )
    at = split.to(tl.int64) * n_rows + row
    tl.store(peak + at, highest, mask=row < n_rows)
    tl.store(total + at, sums, mask=row < n_rows)


@triton.jit(do_not_specialize=["n_rows", "n_splits"])
def _join_kernel(
    peak,
    total,
    chosen,
    target,
    logprob,
    lse,
    n_rows,
    n_vocab,
    n_splits,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = row < n_rows
    highest = tl.full([BLOCK_ROWS], MINUS_INFINITY, tl.float32)
    for first in range(0, n_splits, BLOCK_SPLITS):
        split = first + tl.arange(0, BLOCK_SPLITS)
        held = (split < n_splits)[:, None] & inside[None, :]
        at = split[:, None].to(tl.int64) * n_rows + row[None, :]
        found = tl.load(peak + at, mask=held, other=MINUS_INFINITY)
        highest = tl.maximum(highest, tl.max(found, axis=0))
    finite = tl.where(highest == MINUS_INFINITY, 0.0, highest)
    sums = tl.zeros([BLOCK_ROWS], tl.float32)
    for first in range(0, n_splits, BLOCK_SPLITS):
        split = first + tl.arange(0, BLOCK_SPLITS)
        held = (split < n_splits)[:, None] & inside[None, :]
        at = split[:, None].to(tl.int64) * n_rows + row[None, :]
        found = tl.load(peak + at, mask=held, other=MINUS_INFINITY)
        share = tl.load(total + at, mask=held, other=0.0)
        sums += tl.sum(share * tl.exp(found - finite[None, :]), axis=0)
    # No other entry at all: minus infinity.
    others = tl.where(sums == 0, MINUS_INFINITY, finite + tl.log(tl.where(sums == 0, 1.0, sums)))
    own = _known(tl.load(target + row, mask=inside, other=-1), n_vocab)
    logit = tl.load(chosen + row, mask=own >= 0, other=float("nan"))
    # An infinite logit is an overflow, not a certainty.
    logit = tl.where(logit == float("inf"), float("nan"), logit)
    ahead = others - logit
    small = log1p(tl.exp(-tl.abs(ahead)))
    tl.store(logprob + row, 0.0 - (tl.maximum(ahead, 0.0) + small), mask=inside)
    tl.store(lse + row, tl.where(ahead > 0, others, logit) + small, mask=inside)


def _can_describe(matrix: Tensor) -> bool:
    """Whether the copy engine can fetch blocks of a matrix."""
    pitch = matrix.stride(0) * matrix.element_size()
    return matrix.stride(1) == 1 and matrix.shape[1] > 0 and pitch % 16 == 0 and matrix.data_ptr() % 16 == 0


def _description(matrix: Tensor, rows: int, columns: int) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, columns])


def logprob(hidden: Tensor, head: Head, target: Tensor, *, tile: Tile | None = None) -> tuple[Tensor, Tensor]:
    """Log-probability of each row's target and the log-sum-exp of its logits, both ``[N]`` float32.

    Rows whose target is outside ``[0, V)`` come back as NaN.

    Args:
        hidden, head, target: the op's arguments, checked.
        tile: what a program works on; None: by the table.
    """
    weight, bias, scale, softcap, coldness = head
    n_rows, width = hidden.shape
    n_vocab = weight.shape[0]
    out, lse = (hidden.new_empty(n_rows, dtype=torch.float32) for _ in range(2))
    if n_rows == 0 or n_vocab == 0:
        return out.fill_(torch.nan), lse.fill_(torch.nan)
    tile = tile or tile_for(n_rows, hidden.dtype)
    row_blocks, blocks = divided_up(n_rows, tile.rows), divided_up(n_vocab, tile.columns)
    blocks_each = max(1, divided_up(blocks * row_blocks, _programs_for(tile, hidden, row_blocks)))
    n_splits = divided_up(blocks, blocks_each)
    peak, total = (hidden.new_empty(n_splits, n_rows, dtype=torch.float32) for _ in range(2))
    chosen = torch.empty_like(out)
    hidden, target, bias = adjacent(hidden), target.contiguous(), contiguous(bias)
    described = tile.described and _can_describe(hidden) and _can_describe(weight)
    with current(hidden):
        _logprob_kernel[(row_blocks * n_splits,)](
            _description(hidden, tile.rows, tile.width) if described else hidden,
            _description(weight, tile.columns, tile.width) if described else weight,
            bias,
            target,
            peak,
            total,
            chosen,
            n_rows,
            n_vocab,
            width,
            hidden.stride(0),
            weight.stride(0),
            weight.stride(1),
            float(scale),
            None if softcap is None else float(softcap),
            float(coldness),
            n_splits,
            blocks_each,
            tile.rows,
            tile.columns,
            tile.width,
            _GROUP,
            tile.persistent,
            described,
            num_warps=tile.warps,
            num_stages=_stages_for(tile, hidden),
            **OPTIONS,
        )
        rows = 32
        _join_kernel[(divided_up(n_rows, rows),)](
            peak, total, chosen, target, out, lse, n_rows, n_vocab, n_splits, rows, 32, num_warps=4, **OPTIONS
        )
    return out, lse
