"""The unembedding as the log-probability op takes it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["Head"]


class Head(NamedTuple):
    """From hidden states to the logits that are compared: ``coldness·softcap·tanh(scale·(Wh + bias)/softcap)``.

    Attributes:
        weight: the unembedding matrix W, ``[n_vocab, d_model]``.
        bias: ``[n_vocab]`` or None.
        scale: multiplies the products.
        softcap: bounds the logits, or None.
        coldness: multiplies the finished logits, the inverse of a temperature; a model's own logits have 1.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    coldness: float = 1.0

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., n_vocab] logits of ``hidden`` [..., d_model], in the weight's dtype as a model computes them."""
        logits = functional.linear(hidden.to(self.weight.device), self.weight, self.bias)
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits if self.coldness == 1.0 else logits * self.coldness

    def bounded(self, products: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Logits of products ``Wh``, and the derivative that the softcap adds to the chain (None: 1).

        Args:
            products: ``[N, c]`` of some tokens, in the dtype of the arithmetic.
            bias: ``[c]`` of the same tokens, or None.
        """
        logits = products if bias is None else products + bias.to(products.dtype)
        if self.softcap is None:
            slope = self.scale * self.coldness
            return logits if slope == 1 else logits * slope, None
        bounded = torch.tanh(logits * (self.scale / self.softcap))
        return bounded * (self.softcap * self.coldness), 1 - bounded * bounded
