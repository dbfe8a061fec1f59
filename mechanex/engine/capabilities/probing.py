"""What the probes share: the texts that are tried, and when two results are the same but for rounding."""

from __future__ import annotations

import torch
from torch import Tensor

from ..intervention import widest
from ..models.adapter import ModelAdapter

__all__ = ["TOLERANCE", "close", "drawn_tokens", "probe_pairs"]

# Largest relative difference of a hidden state that rounding explains; a wrong mask is off by far more.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}


def close(a: Tensor, b: Tensor) -> bool:
    """Whether every row agrees to rounding of the dtype; never for NaN."""
    wide = widest(b.device)
    difference = (a.to(b.device) - b).to(wide).norm(dim=-1) / b.to(wide).norm(dim=-1).clamp_min(1e-12)
    return bool((difference <= TOLERANCE.get(b.dtype, TOLERANCE[torch.float32])).all())


def drawn_tokens(vocab: int, n: int, generator: torch.Generator) -> Tensor:
    """[n] token ids from all over a vocabulary but its ends, where special tokens are."""
    return torch.randint(vocab - vocab // 4, (n,), generator=generator) + vocab // 8


def probe_pairs(adapter: ModelAdapter, outgrown: int | None) -> list[tuple[list[int], list[int]]]:
    """Three prompts with ragged completions, of spread-out token ids; the first is longer than ``outgrown`` tokens."""
    vocab = int(adapter.config.vocab_size)
    generator = torch.Generator().manual_seed(0)

    def draw(n: int) -> list[int]:
        ids: list[int] = drawn_tokens(vocab, n, generator).tolist()
        return ids

    first, second, third = draw(7 + (outgrown or 0)), draw(4), draw(9)
    return [(first, draw(3)), (first, draw(5)), (second, draw(2)), (third, draw(4)), (third, draw(1))]
