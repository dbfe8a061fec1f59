"""Features of sparse autoencoders by the compiled kernels (`csrc/cpu/sae.cpp`), which read an encoder as it is kept."""

from __future__ import annotations

import torch
from torch import Tensor

from . import native
from .eager_sae import wide_dtype

__all__ = ["declines_many_rows", "refuses", "sae_features", "sae_top_features"]

# From this many rows on, matrix products are left to torch, which widens what isn't float32 or float64 piece by piece:
# for an encoder of 65,536 bfloat16 features of width 768 that took longer than the kernel even for 64 rows.
TORCH_ROWS = {torch.float32: 32, torch.float64: 32, torch.bfloat16: 256, torch.float16: 256, torch.int8: 256}
_CODES = {**native._DTYPE_CODES, torch.int8: 4}


def refuses(hidden: Tensor, encoder: Tensor, *more: object) -> str | None:
    """Why the kernels can't take these arguments, or None."""
    if hidden.is_cuda:
        return "there is no CUDA kernel for it"
    if hidden.dtype is torch.float64 and encoder.dtype is not torch.float64:
        return f"hidden is float64 and the encoder {encoder.dtype}: convert one of them"
    if any(t.is_neg() for t in (hidden, encoder, *more) if isinstance(t, Tensor)):
        return native._NEGATED
    return None


def declines_many_rows(hidden: Tensor, encoder: Tensor, *more: object) -> str | None:
    """Why ``auto`` leaves these arguments to plain torch, or None."""
    if hidden.shape[0] >= TORCH_ROWS[encoder.dtype]:
        return "many rows are a matrix product"
    return None


def sae_features(
    hidden: Tensor,
    encoder: Tensor,
    bias: Tensor,
    threshold: Tensor | None,
    gain: Tensor | None,
    offset: Tensor | None,
    scale: Tensor | None,
) -> Tensor:
    """See :func:`mechanex.backends.reference.sae_features`."""
    wide = wide_dtype(hidden, encoder)
    x, encoder = hidden.to(wide).contiguous(), encoder.contiguous()
    more = [native._table(t, wide) for t in (scale, bias, threshold, gain, offset)]
    out = x.new_empty(x.shape[0], encoder.shape[0])
    native._module().sae_features(
        _CODES[encoder.dtype],
        x.shape[0],
        *encoder.shape,
        x.data_ptr(),
        encoder.data_ptr(),
        *(0 if t is None else t.data_ptr() for t in more),
        out.data_ptr(),
    )
    return out


def sae_top_features(
    hidden: Tensor,
    encoder: Tensor,
    bias: Tensor,
    k: int,
    norms: Tensor | None,
    scale: Tensor | None,
    signed: bool,
) -> tuple[Tensor, Tensor]:
    """See :func:`mechanex.backends.reference.sae_top_features`."""
    wide = wide_dtype(hidden, encoder)
    x, encoder = hidden.to(wide).contiguous(), encoder.contiguous()
    more = [native._table(t, wide) for t in (scale, bias, norms)]
    values = x.new_empty(x.shape[0], k)
    places = torch.empty(x.shape[0], k, dtype=torch.int64)
    native._module().sae_top_features(
        _CODES[encoder.dtype],
        x.shape[0],
        *encoder.shape,
        x.data_ptr(),
        encoder.data_ptr(),
        *(0 if t is None else t.data_ptr() for t in more),
        k,
        signed,
        2 * torch.get_num_threads(),
        values.data_ptr(),
        places.data_ptr(),
    )
    return values, places
