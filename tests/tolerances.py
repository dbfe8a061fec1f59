"""How far a result may be from the truth: the one place for it.

The truth is the reference backend in float64. A result of the same inputs may miss it by half a unit in the
last place of its own dtype (the one rounding at the end), plus what summing in the dtype of the arithmetic
can lose: a sum of ``width`` terms loses about ``sqrt(width)`` units of the sum of their magnitudes, which
``scale`` holds (the same op on absolute values).
"""

from __future__ import annotations

import torch
from torch import Tensor

# What a float32 model's logits may differ by when only the order of the sums differs.
LOGITS = 1e-4


def bound(truth: Tensor, scale: Tensor, dtype: torch.dtype, width: int) -> Tensor:
    """Largest allowed distance from ``truth``, element by element.

    Args:
        truth: the result, float64.
        scale: the same op on absolute values, float64.
        dtype: of the result that is judged.
        width: terms in a sum.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    last = torch.finfo(dtype)
    rounding = 0.505 * last.eps * truth.abs() + last.smallest_normal * last.eps
    return rounding + torch.finfo(wide).eps * (2 + width**0.5) * scale


def assert_within(actual: Tensor, truth: Tensor, scale: Tensor, width: int) -> None:
    """Fail unless every element of ``actual`` is within :func:`bound` of ``truth``; NaN never is."""
    assert actual.shape == truth.shape, f"shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    error = (actual.double() - truth).abs()
    allowed = bound(truth, scale, actual.dtype, width)
    wrong = ~(error <= allowed)
    if wrong.any():
        worst = (error / allowed).nan_to_num(nan=float("inf")).max().item()
        raise AssertionError(
            f"{int(wrong.sum())} of {wrong.numel()} elements are off, the worst {worst:.3g} times the bound"
        )
