"""Completion log-probabilities with the compiled reductions: `csrc/cpu/logprob.cpp` and `csrc/cuda/logprob.cuh`."""

from __future__ import annotations

import torch
from torch import Tensor

from . import native, native_cuda
from .chunked import Chunked, Head

__all__ = ["OP"]


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
        native._DTYPE_CODES[products.dtype],
        n_rows,
        n_columns,
        products.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        target.data_ptr(),
        target.stride(0),
        first,
        head.scale,
        head.softcap or 0.0,
        head.coldness,
        maximum.data_ptr(),
        total.data_ptr(),
        0 if factor is None else factor.data_ptr(),
    )
    if products.is_cuda:
        device = products.get_device()
        native_cuda._module().reduce(*arguments, device, native_cuda._stream_getter()(device))
    else:
        native._module().reduce(*arguments)
    return factor


OP = Chunked(_reduce)
