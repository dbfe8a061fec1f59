"""What the device's matrix products of half types can give."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

__all__ = ["wide_product", "widens"]


@functools.cache
def widens(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products of ``dtype`` on ``device`` can be had in float32, unrounded: CUDA, from torch 2.8 on."""
    if device.type != "cuda":
        return False
    left, right = (torch.ones(8, 8, dtype=dtype, device=device) for _ in range(2))
    try:
        return torch.mm(left, right, out_dtype=torch.float32).dtype is torch.float32
    except (TypeError, RuntimeError):
        return False


def wide_product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` of a half type in float32, where :func:`widens` says that it can be had."""
    return torch.mm(left, right, out_dtype=torch.float32)
