"""Texts of unequal length as rows that end together, padded at their left."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["left_padded"]


def left_padded(texts: Sequence[Sequence[int]], filler: int = 0) -> tuple[Tensor, Tensor]:
    """Rows of token ids, and where each token stands in its text.

    Args:
        texts: token ids, at least one text.
        filler: a token id for the padding, which is never looked at.

    Returns:
        Ids [B, T] int64 and positions [B, T] int64, -1 for padding.
    """
    width = max(map(len, texts))
    ids = torch.full((len(texts), width), filler, dtype=torch.long)
    for row, text in zip(ids, texts, strict=True):
        row[width - len(text) :] = torch.tensor(text)
    lengths = torch.tensor([len(text) for text in texts])
    return ids, (torch.arange(width) - (width - lengths)[:, None]).clamp(min=-1)
