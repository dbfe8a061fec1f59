"""Between a tensor's dtype and the arithmetic's, exactly: also where the interpreter's own conversion is not."""

from __future__ import annotations

import triton
import triton.language as tl

from mechanex.backends.triton import interpreted

__all__ = ["narrow", "widen"]

# The interpreter truncates to bfloat16 and loses its subnormals; there, the rows that come and go as they are
# convert by integers.
_INTERPRETED = tl.constexpr(interpreted())


@triton.jit
def widen(value, WIDE: tl.constexpr):
    if _INTERPRETED and value.dtype == tl.bfloat16:
        bits = value.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        return bits.to(tl.float32, bitcast=True).to(WIDE)
    else:
        return value.to(WIDE)


@triton.jit
def narrow(value, DTYPE: tl.constexpr):
    if _INTERPRETED and tl.bfloat16 == DTYPE:
        bits = value.to(tl.float32).to(tl.uint32, bitcast=True)
        nearest = tl.where(value != value, 0x7FC00000, bits + 0x7FFF + ((bits >> 16) & 1))
        return (nearest >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return value.to(DTYPE)
