"""Features of sparse autoencoders with the Triton kernel (`kernels/sae.py`)."""

from __future__ import annotations

import torch
from torch import Tensor

from . import triton

__all__ = ["declines_many_rows", "refuses", "sae_features", "sae_top_features"]

# From this many rows on, a matrix product with a widened encoder uses a GPU better than tiles that are read for a few.
TORCH_ROWS = 128
_NEGATED = "an argument is a lazily negated view, whose memory holds other values: call resolve_neg()"


def refuses(hidden: Tensor, encoder: Tensor, *more: object) -> str | None:
    """Why the kernel can't take these arguments, or None."""
    if torch.float64 in (hidden.dtype, encoder.dtype):
        return "an argument is float64, whose products of tiles GPUs don't have"
    if any(t.is_neg() for t in (hidden, encoder, *more) if isinstance(t, Tensor)):
        return _NEGATED
    return None


def declines_many_rows(hidden: Tensor, encoder: Tensor, *more: object) -> str | None:
    """Why ``auto`` leaves these arguments to plain torch, or None."""
    return "many rows are a matrix product" if hidden.shape[0] >= TORCH_ROWS else None


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
    found: Tensor = triton._kernel("sae").features(hidden, encoder, bias, threshold, gain, offset, scale)
    return found


def sae_top_features(
    hidden: Tensor,
    encoder: Tensor,
    bias: Tensor,
    k: int,
    norms: Tensor | None,
    scale: Tensor | None,
    signed: bool,
) -> tuple[Tensor, Tensor]:
    """See :func:`mechanex.backends.reference.sae_top_features`; of equal ones any."""
    found: tuple[Tensor, Tensor] = triton._kernel("sae").top_features(
        hidden, encoder, bias, k, norms, scale, signed
    )
    return found
