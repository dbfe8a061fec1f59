"""Features of sparse autoencoders in Triton: tiles of rows and features, the encoder widened as it is read."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mechanex.backends.eager import top_of
from mechanex.ops.encoder import FeatureEncoder

from .convert import widen
from .launch import IN_TRITON, Launcher, adjacent, contiguous, current

__all__ = ["features", "top_features"]

# Rows, features and columns of a tile; the fewest rows that a product of tiles takes are 16.
BLOCK_ROWS, BLOCK_FEATURES, BLOCK_COLUMNS = 16, 64, 64
# Features whose scores are held at once while the largest are looked for.
PIECE = 1 << 14


@triton.jit(do_not_specialize=["n_rows", "n_features"])
def _sae_kernel(
    hidden,
    encoder,
    bias,
    threshold,
    gain,
    offset,
    scale,
    norms,
    out,
    n_rows,
    n_features,
    width,
    hidden_stride,
    SCORES: tl.constexpr,
    ROWS: tl.constexpr,
    FEATURES: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
):
    t = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    f = (tl.program_id(0) * FEATURES + tl.arange(0, FEATURES)).to(tl.int64)
    known = f < n_features
    product = tl.zeros([ROWS, FEATURES], WIDE)
    for first in range(0, width, COLUMNS):
        c = first + tl.arange(0, COLUMNS)
        inside = (c < width)[None, :]
        x = tl.load(
            hidden + t[:, None] * hidden_stride + c[None, :], mask=(t < n_rows)[:, None] & inside, other=0.0
        )
        w = tl.load(encoder + f[:, None] * width + c[None, :], mask=known[:, None] & inside, other=0)
        product = tl.dot(widen(x, WIDE), tl.trans(widen(w, WIDE)), acc=product, input_precision="ieee")
    if scale is not None:
        product *= tl.load(scale + f, mask=known, other=0.0).to(WIDE)[None, :]
    z = product + tl.load(bias + f, mask=known, other=0.0).to(WIDE)[None, :]
    if SCORES:
        if norms is not None:
            z *= tl.load(norms + f, mask=known, other=0.0).to(WIDE)[None, :]
        result = z
    else:
        said = z
        if gain is not None:
            said = product * tl.load(gain + f, mask=known, other=0.0).to(WIDE)[None, :]
            said += tl.load(offset + f, mask=known, other=0.0).to(WIDE)[None, :]
        level = tl.zeros([FEATURES], WIDE)
        if threshold is not None:
            level = tl.load(threshold + f, mask=known, other=0.0).to(WIDE)
        said = tl.where(said < 0, 0.0, said)
        result = tl.where(z > level[None, :], said, tl.where(z == z, 0.0, z))
    tl.store(out + t[:, None] * n_features + f[None, :], result, mask=(t < n_rows)[:, None] & known[None, :])


_launch = Launcher(_sae_kernel)


def _run(hidden: Tensor, encoder: FeatureEncoder, scores: bool) -> Tensor:
    n_rows, width = hidden.shape
    n_features = encoder.weight.shape[0]
    wide = encoder.dtype_for(hidden)
    out = torch.empty(n_rows, n_features, dtype=wide, device=hidden.device)
    if out.numel() == 0:
        return out
    hidden = adjacent(hidden)
    with current(hidden):
        _launch(
            (triton.cdiv(n_features, BLOCK_FEATURES), triton.cdiv(n_rows, BLOCK_ROWS), 1),
            hidden.device,
            (
                hidden,
                contiguous(encoder.weight),
                contiguous(encoder.bias),
                contiguous(encoder.threshold),
                contiguous(encoder.gain),
                contiguous(encoder.offset),
                contiguous(encoder.scale),
                contiguous(encoder.norms),
                out,
                n_rows,
                n_features,
                width,
                hidden.stride(0),
            ),
            (scores, BLOCK_ROWS, BLOCK_FEATURES, BLOCK_COLUMNS, IN_TRITON[wide]),
            4,
        )
    return out


def features(hidden: Tensor, encoder: FeatureEncoder) -> Tensor:
    """See :func:`mechanex.backends.reference.sae_features`."""
    return _run(hidden, encoder, False)


def top_features(hidden: Tensor, encoder: FeatureEncoder, k: int, signed: bool) -> tuple[Tensor, Tensor]:
    """See :func:`mechanex.backends.reference.sae_top_features`; of equal ones any."""
    parts = range(0, encoder.weight.shape[0], PIECE)
    scores = ((first, _run(hidden, encoder.part(slice(first, first + PIECE)), True)) for first in parts)
    return top_of(scores, k, signed)
