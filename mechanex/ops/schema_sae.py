"""The ops of sparse autoencoders as torch.library knows them, as in :mod:`mechanex.ops.schema`; without gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mechanex import backends
from mechanex.backends.eager_sae import wide_dtype

__all__ = ["sae_features", "sae_top_features"]


@torch.library.custom_op("mechanex::sae_features", mutates_args=())
def _sae_features(
    hidden: Tensor,
    encoder: Tensor,
    bias: Tensor,
    threshold: Tensor | None,
    gain: Tensor | None,
    offset: Tensor | None,
    scale: Tensor | None,
    backend: str | None,
) -> Tensor:
    args = (hidden, encoder, bias, threshold, gain, offset, scale)
    return backends.kernel("sae_features", backend, *args)(*args)


@_sae_features.register_fake
def _(hidden: Tensor, encoder: Tensor, *_: Any) -> Tensor:
    return hidden.new_empty(hidden.shape[0], encoder.shape[0], dtype=wide_dtype(hidden, encoder))


def sae_features(
    hidden: Tensor,
    encoder: Tensor,
    bias: Tensor,
    threshold: Tensor | None,
    gain: Tensor | None,
    offset: Tensor | None,
    scale: Tensor | None,
    backend: str | None,
) -> Tensor:
    """The library op ``mechanex::sae_features``; for arguments that are checked already."""
    found: Tensor = torch.ops.mechanex.sae_features(
        hidden, encoder, bias, threshold, gain, offset, scale, backend
    )
    return found


@torch.library.custom_op("mechanex::sae_top_features", mutates_args=())
def _sae_top_features(
    hidden: Tensor,
    encoder: Tensor,
    bias: Tensor,
    k: int,
    norms: Tensor | None,
    scale: Tensor | None,
    signed: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    args = (hidden, encoder, bias, k, norms, scale, signed)
    values, places = backends.select("sae_top_features", backend, *args).run(*args)
    return values, places


@_sae_top_features.register_fake
def _(
    hidden: Tensor,
    encoder: Tensor,
    bias: Tensor,
    k: int,
    norms: Tensor | None,
    scale: Tensor | None,
    signed: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    shape = (hidden.shape[0], k)
    values = hidden.new_empty(shape, dtype=wide_dtype(hidden, encoder))
    return values, hidden.new_empty(shape, dtype=torch.int64)


def sae_top_features(
    hidden: Tensor,
    encoder: Tensor,
    bias: Tensor,
    k: int,
    norms: Tensor | None,
    scale: Tensor | None,
    signed: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """The library op ``mechanex::sae_top_features``; for arguments that are checked already."""
    values, places = torch.ops.mechanex.sae_top_features(
        hidden, encoder, bias, k, norms, scale, signed, backend
    )
    return values, places
