"""What the walk over the vocabulary does with a chunk of products, in Triton: one read of it, two for a gradient.

A program owns a row. Each of its lanes keeps a running maximum and sum of its own columns; they are joined with each
other, and with what earlier chunks left, at the end. No atomics: twice the same bits.
"""

from __future__ import annotations

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from mechanex.ops.head import Head

from .convert import narrow, widen
from .launch import IN_TRITON, OPTIONS, contiguous, current
from .logprob import MINUS_INFINITY, tanh

__all__ = ["reduce"]

# Columns at a time: enough loads under way to keep a multiprocessor's share of the memory busy.
_COLUMNS = 4096
_WARPS = 8


@triton.jit
def _number(bits, WIDE: tl.constexpr):
    # Floating-point arguments would arrive in single precision.
    return bits.to(tl.int64).to(tl.float64, bitcast=True).to(WIDE)


@triton.jit
def _bounded(products, bias, column, own, n_columns, scale, softcap, coldness, WIDE: tl.constexpr):
    """A row's logits, minus infinity outside and at the target, and the derivative that the softcap adds."""
    inside = column < n_columns
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


@triton.jit(do_not_specialize=["first", "scale", "softcap", "coldness"])
def _reduce_kernel(
    products,
    bias,
    target,
    maximum,
    total,
    factor,
    first,
    n_columns,
    products_stride,
    target_stride,
    scale,
    softcap,
    coldness,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    scale = _number(scale, WIDE)
    softcap = _number(softcap, WIDE) if CAPPED else None
    coldness = _number(coldness, WIDE)
    row = tl.program_id(0).to(tl.int64)
    products += row * products_stride
    own = tl.load(target + row * target_stride) - first
    highest = tl.full([BLOCK], MINUS_INFINITY, WIDE)
    sums = tl.zeros([BLOCK], WIDE)
    for start in range(0, n_columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        logits, _ = _bounded(products, bias, column, own, n_columns, scale, softcap, coldness, WIDE)
        higher = tl.maximum(highest, logits)
        finite = _finite(higher)
        sums = sums * tl.exp(highest - finite) + tl.exp(logits - finite)
        highest = higher
    former = tl.load(maximum + row)
    joined = tl.maximum(former, tl.max(highest, axis=0))
    finite = _finite(joined)
    rescaled = tl.exp(former - finite)
    tl.store(maximum + row, joined)
    tl.store(total + row, tl.load(total + row) * rescaled + tl.sum(sums * tl.exp(highest - finite), axis=0))
    if factor is not None:
        tl.store(factor + row, rescaled)
        for start in range(0, n_columns, BLOCK):
            column = start + tl.arange(0, BLOCK)
            logits, steep = _bounded(products, bias, column, own, n_columns, scale, softcap, coldness, WIDE)
            share = tl.exp(logits - finite) * steep
            tl.store(products + column, narrow(share, products.dtype.element_ty), mask=column < n_columns)


def reduce(
    head: Head, products: Tensor, first: int, target: Tensor, maximum: Tensor, total: Tensor, with_slope: bool
) -> Tensor | None:
    """Fold a chunk into ``maximum`` and ``total``; see :data:`mechanex.backends.chunked.Reduce`.

    Args:
        head: the op's.
        products: ``[n, c]``, columns adjacent; overwritten with a slope.
        first: the first column's token.
        target: ``[n]``.
        maximum, total: ``[n]`` float32 (float64 for float64), written.
        with_slope: whether gradients are wanted.
    """
    n_rows, n_columns = products.shape
    factor = torch.empty_like(maximum) if with_slope else None
    bias = None if head.bias is None else head.bias[first : first + n_columns]
    with current(products):
        _reduce_kernel[(n_rows,)](
            products,
            None if bias is None else contiguous(bias.to(maximum.dtype)),
            target,
            maximum,
            total,
            factor,
            first,
            n_columns,
            products.stride(0),
            target.stride(0),
            _bits(head.scale),
            _bits(head.softcap or 0.0),
            _bits(head.coldness),
            head.softcap is not None,
            min(triton.next_power_of_2(n_columns), _COLUMNS),
            IN_TRITON[maximum.dtype],
            num_warps=_WARPS,
            **OPTIONS,
        )
    return factor


def _bits(number: float) -> int:
    return int.from_bytes(struct.pack("<d", number), "little", signed=True)
