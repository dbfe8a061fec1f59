"""Features of sparse autoencoders by the compiled kernels (`csrc/cpu/sae.cpp`), which read an encoder as it is kept."""

from __future__ import annotations

import torch
from torch import Tensor

from mechanex.ops.encoder import FeatureEncoder

from ..backend import NEGATED, is_negated
from . import modules
from .modules import address, table

__all__ = ["TORCH_ROWS", "declines_many_rows", "refuses", "sae_features", "sae_top_features"]

# From this many rows on, matrix products are left to torch, which widens what isn't float32 or float64 piece by piece:
# for an encoder of 65,536 bfloat16 features of width 768 that took longer than the kernel even for 64 rows.
TORCH_ROWS = {torch.float32: 32, torch.float64: 32, torch.bfloat16: 256, torch.float16: 256, torch.int8: 256}
_CODES = {**modules.DTYPE_CODES, torch.int8: 4}


def refuses(hidden: Tensor, encoder: FeatureEncoder, *_: object) -> str | None:
    """Why the kernels can't take these arguments, or None."""
    if hidden.is_cuda:
        return "there is no CUDA kernel for it"
    if hidden.dtype is torch.float64 and encoder.weight.dtype is not torch.float64:
        return f"hidden is float64 and the encoder {encoder.weight.dtype}: convert one of them"
    return NEGATED if any(map(is_negated, (hidden, *encoder))) else None


def declines_many_rows(hidden: Tensor, encoder: FeatureEncoder, *_: object) -> str | None:
    """Why ``auto`` leaves these arguments to plain torch, or None."""
    return "many rows are a matrix product" if hidden.shape[0] >= TORCH_ROWS[encoder.weight.dtype] else None


def sae_features(hidden: Tensor, encoder: FeatureEncoder) -> Tensor:
    """See :func:`mechanex.backends.reference.sae_features`."""
    wide = encoder.dtype_for(hidden)
    x, weight = hidden.to(wide).contiguous(), encoder.weight.contiguous()
    given = (encoder.scale, encoder.bias, encoder.threshold, encoder.gain, encoder.offset)
    more = [table(t, wide) for t in given]
    out = x.new_empty(x.shape[0], weight.shape[0])
    modules.cpu().sae_features(
        _CODES[weight.dtype],
        x.shape[0],
        *weight.shape,
        x.data_ptr(),
        weight.data_ptr(),
        *map(address, more),
        out.data_ptr(),
    )
    return out


def sae_top_features(hidden: Tensor, encoder: FeatureEncoder, k: int, signed: bool) -> tuple[Tensor, Tensor]:
    """See :func:`mechanex.backends.reference.sae_top_features`."""
    wide = encoder.dtype_for(hidden)
    x, weight = hidden.to(wide).contiguous(), encoder.weight.contiguous()
    more = [table(t, wide) for t in (encoder.scale, encoder.bias, encoder.norms)]
    values = x.new_empty(x.shape[0], k)
    places = torch.empty(x.shape[0], k, dtype=torch.int64)
    modules.cpu().sae_top_features(
        _CODES[weight.dtype],
        x.shape[0],
        *weight.shape,
        x.data_ptr(),
        weight.data_ptr(),
        *map(address, more),
        k,
        signed,
        2 * torch.get_num_threads(),
        values.data_ptr(),
        places.data_ptr(),
    )
    return values, places
