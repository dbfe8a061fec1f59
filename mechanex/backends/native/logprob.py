"""Completion log-probabilities with the compiled reductions: `csrc/cpu/logprob.cpp` and `csrc/cuda/logprob.cuh`."""

from __future__ import annotations

import torch
from torch import Tensor

from mechanex.ops.head import Head

from ..chunked import Chunked
from . import modules
from .modules import DTYPE_CODES, address, on_stream

__all__ = ["LOGPROB"]


def _reduce(
    head: Head, products: Tensor, first: int, target: Tensor, maximum: Tensor, total: Tensor, with_slope: bool
) -> Tensor | None:
    """See :data:`mechanex.backends.chunked.Reduce`."""
    n_rows, n_columns = products.shape
    factor = torch.empty_like(maximum) if with_slope else None
    bias = None
    if head.bias is not None:
        bias = head.bias[first : first + n_columns].to(maximum.dtype).contiguous().resolve_neg()
    arguments = (
        DTYPE_CODES[products.dtype],
        n_rows,
        n_columns,
        products.data_ptr(),
        address(bias),
        target.data_ptr(),
        target.stride(0),
        first,
        head.scale,
        head.softcap or 0.0,
        head.coldness,
        maximum.data_ptr(),
        total.data_ptr(),
        address(factor),
    )
    if products.is_cuda:
        modules.cuda().reduce(*arguments, *on_stream(products))
    else:
        modules.cpu().reduce(*arguments)
    return factor


LOGPROB = Chunked(_reduce)
