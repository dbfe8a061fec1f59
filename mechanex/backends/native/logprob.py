"""Completion log-probabilities with the compiled reductions: `csrc/cpu/logprob.cpp` and `csrc/cuda/logprob.cuh`.

On GPUs whose blocks read each other's shared memory (compute capability 9.0) the gradient of up to 64 rows of a half
type is one walk over the unembedding, `csrc/cuda/logprob_walk.cuh`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mechanex.ops.head import Head

from ..chunked import MOST_BYTES, ROOM, Chunked, share_unit
from . import modules
from .modules import DTYPE_CODES, address, on_stream

__all__ = ["LOGPROB", "walk_with"]


def _reduce(
    head: Head,
    products: Tensor,
    first: int,
    target: Tensor,
    maximum: Tensor,
    total: Tensor,
    sums: Tensor | None,
    shares: Tensor | None,
) -> None:
    """See :data:`mechanex.backends.chunked.Reduce`."""
    n_rows, n_columns = products.shape
    factor = torch.empty_like(maximum) if shares is not None else None
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
    if sums is not None and factor is not None:
        sums.mul_(factor.unsqueeze(1))
    if shares is not None and shares is not products:
        unit = share_unit(shares, products)
        shares.copy_(products if unit == 1 else products.mul_(unit))


def _walk(head: Head, hidden: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """See :data:`mechanex.backends.chunked.Walk`."""
    if not hidden.is_cuda:
        return None
    return walk_with(modules.cuda(), head, hidden, target, on_stream(hidden))


def walk_with(
    module: Any, head: Head, hidden: Tensor, target: Tensor, place: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor] | None:
    """The walk by a compiled module; None where it has none for these arguments.

    Args:
        module: with ``walk_groups`` and ``walk``; as many parts as the bounds of memory allow.
        head, hidden, target: as for :data:`mechanex.backends.chunked.Walk`.
        place: device and stream.
    """
    weight = head.weight
    n_rows, width = hidden.shape
    # The kernel reads 16 bytes of the unembedding at a time.
    if hidden.dtype.itemsize != 2 or weight.stride(1) != 1 or weight.stride(0) % 8 or weight.data_ptr() % 16:
        return None
    groups = module.walk_groups(DTYPE_CODES[hidden.dtype], n_rows, weight.shape[0], width, place[0])
    bias = None if head.bias is None else head.bias.float().contiguous().resolve_neg()
    copied = 0 if bias is None or bias is head.bias else bias.nbytes
    # One more part's memory holds the sums.
    groups = min(groups, (MOST_BYTES - ROOM - copied) // max(4 * n_rows * width, 1) - 1)
    if groups < 1:
        return None
    x = hidden if hidden.stride(1) == 1 else hidden.contiguous()
    maximum, total = (hidden.new_empty(groups, n_rows, dtype=torch.float32) for _ in range(2))
    parts = hidden.new_empty(groups, n_rows, width, dtype=torch.float32)
    module.walk(
        DTYPE_CODES[hidden.dtype],
        *(n_rows, weight.shape[0], width),
        *(x.data_ptr(), x.stride(0), weight.data_ptr(), weight.stride(0), address(bias)),
        *(target.data_ptr(), target.stride(0)),
        *(head.scale, head.softcap or 0.0, head.coldness),
        *(maximum.data_ptr(), total.data_ptr(), parts.data_ptr(), groups),
        *place,
    )
    highest = maximum.amax(0)
    # Where no other token is possible, differences from minus infinity would be NaN.
    factor = (maximum - torch.where(highest == -torch.inf, 0.0, highest)).exp_()
    return highest, total.mul_(factor).sum(0), parts.mul_(factor.unsqueeze(2)).sum(0)


LOGPROB = Chunked(_reduce, _walk, padded=False)
