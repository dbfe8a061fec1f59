"""What the walk over the vocabulary does with a chunk of products, in Triton.

Where the rows fill a GPU, a program owns a row of the chunk; a chunk of few columns it reads once. Of few rows each is
shared among programs, whose maxima and sums come first, in a launch of their own. Lanes keep maxima and sums of their
own columns; they are joined in a fixed order. No atomics: twice the same bits.
"""

from __future__ import annotations

import struct

import triton
import triton.language as tl
from torch import Tensor

from mechanex.backends.chunked import share_unit
from mechanex.ops.head import Head

from .convert import narrow, widen
from .launch import IN_TRITON, Launcher, contiguous, current, divided_up
from .logprob import MINUS_INFINITY, tanh

__all__ = ["bits", "number", "reduce"]

# Columns at a time: enough loads under way to keep a multiprocessor's share of the memory busy. Rows of a chunk that
# has no more are read once.
_COLUMNS = 4096
_WARPS = 8
# Programs that fill any GPU several times over, and the least columns that are worth one.
_PROGRAMS, _LEAST_COLUMNS = 528, 2048


@triton.jit
def number(bits, WIDE: tl.constexpr):
    """A number of the host from its bits: floating-point arguments would arrive in single precision."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True).to(WIDE)


@triton.jit
def _bounded(products, bias, column, own, end, scale, softcap, coldness, WIDE: tl.constexpr):
    """A row's logits, minus infinity from ``end`` on and at the target, and the derivative that the softcap adds."""
    inside = column < end
    logits = widen(tl.load(products + column, mask=inside, other=0.0), WIDE)
    if bias is not None:
        logits += tl.load(bias + column, mask=inside, other=0.0)
    logits *= scale
    steep = 1.0
    if softcap is not None:
        logits = logits / softcap
        e = tl.exp(-2 * tl.abs(logits))
        # 1 - tanh², without the difference.
        steep = 4 * e / ((1 + e) * (1 + e))
        logits = softcap * tanh(logits, e)
    return tl.where(inside & (column != own), logits * coldness, MINUS_INFINITY), steep


@triton.jit
def _finite(maximum):
    """The maximum to take differences from: minus infinity would make them NaN, any number makes them vanish."""
    return tl.where(maximum == MINUS_INFINITY, 0.0, maximum)


@triton.jit
def _folded(
    products, bias, own, begin, end, scale, softcap, coldness, BLOCK: tl.constexpr, WIDE: tl.constexpr
):
    """Maximum and sum of exponentials of some columns of a row."""
    highest = tl.full([BLOCK], MINUS_INFINITY, WIDE)
    sums = tl.zeros([BLOCK], WIDE)
    for start in range(begin, end, BLOCK):
        column = start + tl.arange(0, BLOCK)
        logits, _ = _bounded(products, bias, column, own, end, scale, softcap, coldness, WIDE)
        higher = tl.maximum(highest, logits)
        finite = _finite(higher)
        sums = sums * tl.exp(highest - finite) + tl.exp(logits - finite)
        highest = higher
    peak = tl.max(highest, axis=0)
    return peak, tl.sum(sums * tl.exp(highest - _finite(peak)), axis=0)


@triton.jit(do_not_specialize=["first", "each", "scale", "softcap", "coldness"])
def _part_kernel(
    products,
    bias,
    target,
    maximum,
    total,
    peaks,
    parts,
    first,
    n_columns,
    each,
    products_stride,
    target_stride,
    scale,
    softcap,
    coldness,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Maximum and sum of each part of a row; behind them those that earlier chunks left."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    n_splits = tl.num_programs(1)
    own = tl.load(target + row * target_stride) - first
    begin = split * each
    end = tl.minimum(begin + each, n_columns)
    peak, sum = _folded(
        products + row * products_stride,
        bias,
        own,
        begin,
        end,
        number(scale, WIDE),
        number(softcap, WIDE) if CAPPED else None,
        number(coldness, WIDE),
        BLOCK,
        WIDE,
    )
    at = row * (n_splits + 1)
    tl.store(peaks + at + split, peak)
    tl.store(parts + at + split, sum)
    if split == 0:
        tl.store(peaks + at + n_splits, tl.load(maximum + row))
        tl.store(parts + at + n_splits, tl.load(total + row))


@triton.jit
def _store_shares(shares, column, end, logits, steep, finite, UNIT: tl.constexpr, SHARED: tl.constexpr):
    share = tl.exp(logits - finite) * steep * UNIT
    if SHARED:
        # Narrow shares take the place of products that others of this program may not have read.
        tl.debug_barrier()
    tl.store(shares + column, narrow(share, shares.dtype.element_ty), mask=column < end)


@triton.jit(do_not_specialize=["first", "each", "scale", "softcap", "coldness"])
def _reduce_kernel(
    products,
    bias,
    target,
    maximum,
    total,
    peaks,
    parts,
    sums,
    shares,
    first,
    n_columns,
    each,
    n_parts,
    width,
    products_stride,
    shares_stride,
    target_stride,
    scale,
    softcap,
    coldness,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    ONCE: tl.constexpr,
    UNIT: tl.constexpr,
    SHARED: tl.constexpr,
    WIDE: tl.constexpr,
):
    scale = number(scale, WIDE)
    softcap = number(softcap, WIDE) if CAPPED else None
    coldness = number(coldness, WIDE)
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    products += row * products_stride
    own = tl.load(target + row * target_stride) - first
    begin = split * each
    end = tl.minimum(begin + each, n_columns)
    lane = tl.arange(0, BLOCK)
    if peaks is not None:
        part = tl.arange(0, PARTS)
        held = part < n_parts
        found = tl.load(peaks + row * n_parts + part, mask=held, other=MINUS_INFINITY)
        share = tl.load(parts + row * n_parts + part, mask=held, other=0.0)
        former = tl.load(peaks + row * n_parts + n_parts - 1)
        joined = tl.max(found, axis=0)
        finite = _finite(joined)
        sum = tl.sum(share * tl.exp(found - finite), axis=0)
    else:
        former = tl.load(maximum + row)
        if ONCE:
            logits, steep = _bounded(products, bias, lane, own, end, scale, softcap, coldness, WIDE)
            joined = tl.maximum(former, tl.max(logits, axis=0))
            finite = _finite(joined)
            sum = tl.sum(tl.exp(logits - finite), axis=0)
        else:
            peak, part = _folded(products, bias, own, begin, end, scale, softcap, coldness, BLOCK, WIDE)
            joined = tl.maximum(former, peak)
            finite = _finite(joined)
            sum = part * tl.exp(peak - finite)
        sum += tl.load(total + row) * tl.exp(former - finite)
    if split == 0:
        tl.store(maximum + row, joined)
        tl.store(total + row, sum)
        if sums is not None:
            factor = tl.exp(former - finite)
            # In most chunks a row meets nothing higher than it has seen.
            if factor != 1:
                sums += row * width
                for start in range(0, width, BLOCK):
                    at = start + lane
                    value = tl.load(sums + at, mask=at < width, other=0.0)
                    tl.store(sums + at, value * factor, mask=at < width)
    if shares is not None:
        shares += row * shares_stride
        if ONCE and peaks is None:
            _store_shares(shares, lane, end, logits, steep, finite, UNIT, SHARED)
        else:
            for start in range(begin, end, BLOCK):
                column = start + lane
                logits, steep = _bounded(products, bias, column, own, end, scale, softcap, coldness, WIDE)
                _store_shares(shares, column, end, logits, steep, finite, UNIT, SHARED)


_launch_part = Launcher(_part_kernel)
_launch = Launcher(_reduce_kernel)


def reduce(
    head: Head,
    products: Tensor,
    first: int,
    target: Tensor,
    maximum: Tensor,
    total: Tensor,
    sums: Tensor | None,
    shares: Tensor | None,
) -> None:
    """Fold a chunk into ``maximum`` and ``total``; see :data:`mechanex.backends.chunked.Reduce`.

    Args:
        head: the op's.
        products: ``[n, c]``, columns adjacent.
        first: the first column's token.
        target: ``[n]``.
        maximum, total: ``[n]`` float32 (float64 for float64), written.
        sums: ``[n, d]``, contiguous, of the same dtype, multiplied, or None.
        shares: ``[n, c]``, columns adjacent, written, or None.
    """
    n_rows, n_columns = products.shape
    bias = None
    if head.bias is not None:
        bias = contiguous(head.bias[first : first + n_columns].to(maximum.dtype))
    in_place = shares is not None and shares.data_ptr() == products.data_ptr()
    narrows = in_place and shares is not None and shares.dtype is not products.dtype
    n_splits = 1
    if not narrows:
        n_splits = min(max(1, _PROGRAMS // n_rows), divided_up(n_columns, _LEAST_COLUMNS))
    each = divided_up(divided_up(n_columns, n_splits), 64) * 64
    n_splits = divided_up(n_columns, each)
    block = min(max(triton.next_power_of_2(each), 16), _COLUMNS)
    wide = IN_TRITON[maximum.dtype]
    numbers = bits(head.scale), bits(head.softcap or 0.0), bits(head.coldness)
    capped = head.softcap is not None
    peaks = parts = None
    grid = (n_rows, n_splits, 1)
    with current(products):
        if n_splits > 1:
            peaks, parts = (maximum.new_empty(n_rows, n_splits + 1) for _ in range(2))
            _launch_part(
                grid,
                products.device,
                (
                    *(products, bias, target, maximum, total, peaks, parts, first, n_columns, each),
                    *(products.stride(0), target.stride(0), *numbers),
                ),
                (capped, block, wide),
                _WARPS,
            )
            if shares is None:
                grid = (n_rows, 1, 1)
        _launch(
            grid,
            products.device,
            (
                *(products, bias, target, maximum, total, peaks, parts, sums, shares, first, n_columns, each),
                *(n_splits + 1, 0 if sums is None else sums.shape[1], products.stride(0)),
                *(0 if shares is None else shares.stride(0), target.stride(0), *numbers),
            ),
            (
                capped,
                block,
                triton.next_power_of_2(n_splits + 1),
                each <= block,
                1.0 if shares is None else share_unit(shares, products),
                narrows,
                wide,
            ),
            _WARPS,
        )


def bits(number: float) -> int:
    """What :func:`number` reads."""
    return int.from_bytes(struct.pack("<d", number), "little", signed=True)
