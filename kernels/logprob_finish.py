"""What the walk over the vocabulary left becomes log-probabilities and their slopes, in Triton; a program owns a row.

The target's logit is a dot product of its own. What there is one number of for a row is worked out in float64.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mechanex.backends.chunked import Found
from mechanex.ops.head import Head

from .convert import narrow, widen
from .launch import IN_TRITON, Launcher, current
from .logprob import MINUS_INFINITY, log1p, tanh
from .logprob_reduce import bits, number

__all__ = ["finish"]

# Elements of a row at a time.
_BLOCK = 1024
_WARPS = 4


@triton.jit(do_not_specialize=["scale", "softcap", "coldness"])
def _finish_kernel(
    hidden,
    weight,
    bias,
    target,
    maximum,
    total,
    sums,
    logprob,
    lse,
    slope,
    size,
    n_vocab,
    width,
    hidden_stride,
    hidden_step,
    weight_stride,
    weight_step,
    bias_stride,
    target_stride,
    scale,
    softcap,
    coldness,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(target + row * target_stride)
    known = (token >= 0) & (token < n_vocab)
    token = tl.where(known, token, 0)
    hidden += row * hidden_stride
    weight += token * weight_stride
    lane = tl.arange(0, BLOCK).to(tl.int64)
    products = tl.zeros([BLOCK], WIDE)
    for start in range(0, width, BLOCK):
        at = start + lane
        x = widen(tl.load(hidden + at * hidden_step, mask=at < width, other=0.0), WIDE)
        w = widen(tl.load(weight + at * weight_step, mask=at < width, other=0.0), WIDE)
        products += x * w
    own = tl.sum(products, axis=0)
    if bias is not None:
        own += widen(tl.load(bias + token * bias_stride), WIDE)
    own = own.to(tl.float64) * number(scale, tl.float64)
    steep = tl.full([], 1.0, tl.float64)
    if CAPPED:
        cap = number(softcap, tl.float64)
        own = own / cap
        e = tl.exp(-2 * tl.abs(own))
        # 1 - tanh², without the difference.
        steep = 4 * e / ((1 + e) * (1 + e))
        own = cap * tanh(own, e)
    own *= number(coldness, tl.float64)
    # An infinite logit is an overflow, not a certainty.
    own = tl.where(known & (own != float("inf")), own, float("nan"))
    sum = tl.load(total + row).to(tl.float64)
    peak = tl.load(maximum + row).to(tl.float64)
    sum_or_one = tl.where(sum == 0, 1.0, sum)
    # No other entry at all: minus infinity.
    others = tl.where(sum == 0, MINUS_INFINITY, peak + tl.log(sum_or_one))
    ahead = others - own
    e = tl.exp(-tl.abs(ahead))
    small = log1p(e)
    tl.store(logprob + row, (0.0 - (tl.maximum(ahead, 0.0) + small)).to(WIDE))
    tl.store(lse + row, (tl.where(ahead > 0, others, own) + small).to(WIDE))
    if slope is not None:
        # 1 − p of the target times the others' own probabilities.
        rest = tl.where(ahead > 0, 1.0, e) / (1 + e)
        rest = rest * number(scale, tl.float64) * number(coldness, tl.float64)
        tl.store(size + row, rest.to(WIDE))
        sums += row * width
        slope += row * width
        steep = steep.to(WIDE)
        inverse = (1 / sum_or_one).to(WIDE)
        for start in range(0, width, BLOCK):
            at = start + lane
            w = widen(tl.load(weight + at * weight_step, mask=at < width, other=0.0), WIDE)
            mean = tl.load(sums + at, mask=at < width, other=0.0) * inverse
            tl.store(slope + at, narrow(w * steep - mean, slope.dtype.element_ty), mask=at < width)


_launch = Launcher(_finish_kernel)


def finish(
    head: Head,
    hidden: Tensor,
    target: Tensor,
    maximum: Tensor,
    total: Tensor,
    sums: Tensor | None,
    found: Found,
) -> None:
    """Write the results of a block of rows; see :data:`mechanex.backends.chunked.Finish`.

    Args:
        head: the op's.
        hidden: ``[n, d]``.
        target: ``[n]``.
        maximum, total: ``[n]`` float32 (float64 for float64), of the other tokens.
        sums: ``[n, d]``, contiguous, of the same dtype, or None.
        found: of these rows, contiguous; the slope may be the sums' memory.
    """
    weight, bias, scale, softcap, coldness = head
    n_vocab, width = weight.shape
    with current(hidden):
        _launch(
            (hidden.shape[0], 1, 1),
            hidden.device,
            (
                *(hidden, weight, bias, target, maximum, total, sums),
                *(found.logprob, found.lse, found.slope, found.size),
                *(n_vocab, width, *hidden.stride(), *weight.stride(), 0 if bias is None else bias.stride(0)),
                *(target.stride(0), bits(scale), bits(softcap or 0.0), bits(coldness)),
            ),
            (softcap is not None, _BLOCK, IN_TRITON[maximum.dtype]),
            _WARPS,
        )
