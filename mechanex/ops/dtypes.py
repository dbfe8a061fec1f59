"""The floating dtypes that torch computes in; narrower ones only store numbers."""

from __future__ import annotations

import torch

__all__ = ["DTYPES", "DTYPE_NAMES"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DTYPE_NAMES = "float32, bfloat16, float16 or float64"
