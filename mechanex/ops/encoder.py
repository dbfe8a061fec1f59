"""The encoder of a sparse autoencoder as its ops take it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["FeatureEncoder"]


class FeatureEncoder(NamedTuple):
    """What features ask of a row x: their products ``p = scale·(Ex)``, and what becomes of those.

    Attributes:
        weight: E, ``[F, d]``, floating point or int8.
        bias: ``[F]``, like all that follow.
        scale: of int8 rows; None: 1.
        threshold: what ``p + bias`` must pass; None: 0.
        gain, offset: what an open feature says is ``gain·p + offset``; None: ``p + bias``.
        norms: multiply ``p + bias`` before features are compared; None: 1.
    """

    weight: Tensor
    bias: Tensor
    scale: Tensor | None = None
    threshold: Tensor | None = None
    gain: Tensor | None = None
    offset: Tensor | None = None
    norms: Tensor | None = None

    def dtype_for(self, hidden: Tensor) -> torch.dtype:
        """The dtype of the arithmetic and of the result."""
        return torch.float64 if torch.float64 in (hidden.dtype, self.weight.dtype) else torch.float32

    def part(self, features: slice) -> FeatureEncoder:
        """Some of the features."""
        return FeatureEncoder(*(None if t is None else t[features] for t in self))  # type: ignore[arg-type]
