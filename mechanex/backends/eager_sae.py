"""Features of sparse autoencoders in plain torch: the encoder is widened a piece at a time, never as a whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .eager import without_autocast

__all__ = ["pieces", "sae_features", "sae_top_features", "says", "top_of", "wide_dtype"]

# Numbers of the encoder that are held widened, and of products that are held, at once.
_PIECE = 1 << 22


def wide_dtype(hidden: Tensor, encoder: Tensor) -> torch.dtype:
    """The dtype of the arithmetic and of the result."""
    return torch.float64 if torch.float64 in (hidden.dtype, encoder.dtype) else torch.float32


def pieces(n_features: int, numbers: int) -> Iterator[slice]:
    """The features in slices; ``numbers`` is what one feature takes."""
    step = max(1, _PIECE // max(numbers, 1))
    for first in range(0, n_features, step):
        yield slice(first, first + step)


def says(
    z: Tensor,
    products: Tensor,
    threshold: Tensor | None,
    gain: Tensor | None,
    offset: Tensor | None,
) -> Tensor:
    """What features say, of their products and ``z``, the products plus bias."""
    said = z if gain is None or offset is None else products * gain.to(z) + offset.to(z)
    level: Tensor | float = 0.0 if threshold is None else threshold.to(z)
    # 0 · NaN is NaN and 0 · z is 0 for every number: what is shut says 0, and NaN stays.
    return torch.where(z > level, said.relu(), torch.where(z.isnan(), z, 0.0))


@without_autocast
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
    x = hidden.to(wide)
    found = []
    for part in pieces(encoder.shape[0], encoder.shape[1]):
        products = _products(x, encoder[part], None if scale is None else scale[part])
        found.append(
            says(
                products + bias[part].to(wide), products, *(_part(t, part) for t in (threshold, gain, offset))
            )
        )
    if len(found) == 1:
        return found[0]
    return torch.cat(found, 1) if found else x.new_empty(x.shape[0], 0)


@without_autocast
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
    wide = wide_dtype(hidden, encoder)
    x = hidden.to(wide)

    def scores(part: slice) -> Tensor:
        z = _products(x, encoder[part], None if scale is None else scale[part]) + bias[part].to(wide)
        return z if norms is None else z * norms[part].to(wide)

    return top_of(scores, pieces(encoder.shape[0], max(encoder.shape[1], x.shape[0])), k, signed)


def top_of(
    scores: Callable[[slice], Tensor], parts: Iterator[slice], k: int, signed: bool
) -> tuple[Tensor, Tensor]:
    """The k largest of scores that are given a slice of the features at a time, largest first.

    Args:
        scores: from a slice to the scores of its features, ``[T, n]``.
        parts: the slices in order; there is at least one.
        k: how many to keep.
        signed: compare sizes, and keep what is below 0.
    """
    values = places = None
    for part in parts:
        z = scores(part)
        kept = (z.abs() if signed else z).topk(min(k, z.shape[1]), dim=1).indices
        mine, here = z.gather(1, kept), kept + part.start
        if values is not None and places is not None:
            mine, here = torch.cat([values, mine], 1), torch.cat([places, here], 1)
            kept = (mine.abs() if signed else mine).topk(min(k, mine.shape[1]), dim=1).indices
            mine, here = mine.gather(1, kept), here.gather(1, kept)
        values, places = mine, here
    assert values is not None and places is not None
    return values if signed else values.relu(), places


def _products(x: Tensor, encoder: Tensor, scale: Tensor | None) -> Tensor:
    products = x @ encoder.to(x.dtype).T
    return products if scale is None else products * scale.to(x.dtype)


def _part(tensor: Tensor | None, part: slice) -> Tensor | None:
    return None if tensor is None else tensor[part]
