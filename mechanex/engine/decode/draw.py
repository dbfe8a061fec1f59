"""Drawing a token for every row, each by its own sampling method, from one random number of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..sampling import Sampling

__all__ = ["Draws"]


class Draws:
    """Draws for the same rows step after step, without waiting for the device.

    What a row draws depends on its own logits and number alone: the methods keep the tokens whose score reaches a
    bound (all of equal ones), and the number picks from the kept ones by their summed probabilities in order of ids.

    Args:
        samplings: one per row, none of them greedy.
        device: where logits are.
    """

    def __init__(self, samplings: Sequence[Sampling], device: torch.device) -> None:
        temperatures = [float(s.temperature) for s in samplings]
        self._heat: Tensor | None = None
        if any(t != 1 for t in temperatures):
            self._heat = torch.tensor(temperatures, device=device)[:, None]
        self._kept: list[tuple[Tensor | None, Callable[[Tensor], Tensor]]] = []
        for name, (keep, setting, idle) in _METHODS.items():
            members = [i for i, s in enumerate(samplings) if name in _parts(s)]
            rows = [i for i in members if getattr(samplings[i], setting) not in (idle, 0)]
            if rows:
                where = None if len(rows) == len(samplings) else torch.tensor(rows, device=device)
                self._kept.append((where, keep([getattr(samplings[i], setting) for i in rows], device)))

    def __call__(self, scores: Tensor, best: Tensor, uniform: Tensor) -> Tensor:
        """[rows] int64 tokens.

        Args:
            scores: [rows, vocabulary] float32 logits.
            best: [rows] the highest of each.
            uniform: [rows] float32 on the host, in [0, 1).
        """
        # Only CUDA is known to keep pinned memory until its copy is done.
        pinned = uniform.pin_memory() if scores.is_cuda else uniform
        uniform = pinned.to(scores.device, non_blocking=scores.is_cuda)
        scores = scores - best[:, None]
        if self._heat is not None:
            scores = scores / self._heat
        for where, keep in self._kept:
            part = scores if where is None else scores.index_select(0, where)
            part = part.masked_fill(~keep(part), -torch.inf)
            scores = part if where is None else scores.index_copy(0, where, part)
        sums = _summed(scores.exp())
        # Below the sum, so that the first sum beyond it belongs to a token with a weight.
        target = uniform.to(sums.dtype)[:, None] * sums[:, -1:]
        drawn = torch.searchsorted(sums, target, right=True)
        return drawn[:, 0].clamp(max=scores.shape[-1] - 1)


def _top_k(counts: Sequence[int], device: torch.device) -> Callable[[Tensor], Tensor]:
    most = max(counts)
    places = torch.tensor(counts, device=device)[:, None] - 1

    def keep(scores: Tensor) -> Tensor:
        n_vocab = scores.shape[-1]
        top = scores.topk(min(most, n_vocab), dim=-1).values
        return scores >= top.gather(1, places.clamp(max=n_vocab - 1))

    return keep


def _top_p(masses: Sequence[float], device: torch.device) -> Callable[[Tensor], Tensor]:
    wanted = torch.tensor(masses, dtype=_wide(device), device=device)[:, None]

    def keep(scores: Tensor) -> Tensor:
        ordered = scores.sort(dim=-1, descending=True).values
        return scores >= ordered.gather(1, _reaching(ordered.exp(), wanted))

    return keep


def _min_p(shares: Sequence[float], device: torch.device) -> Callable[[Tensor], Tensor]:
    least = torch.tensor(shares, dtype=_wide(device), device=device).log().float()[:, None]
    return lambda scores: scores >= least


def _typical(masses: Sequence[float], device: torch.device) -> Callable[[Tensor], Tensor]:
    wanted = torch.tensor(masses, dtype=_wide(device), device=device)[:, None]

    def keep(scores: Tensor) -> Tensor:
        logs = scores.log_softmax(-1)
        shares = logs.exp()
        entropy = -(shares * logs).nansum(-1, keepdim=True)
        away = (-logs - entropy).abs()
        ordered, places = away.sort(dim=-1)
        return away <= ordered.gather(1, _reaching(shares.gather(1, places), wanted))

    return keep


_METHODS: dict[
    str, tuple[Callable[[Sequence[Any], torch.device], Callable[[Tensor], Tensor]], str, float | None]
] = {
    "min-p": (_min_p, "min_p", None),
    "top-k": (_top_k, "top_k", None),
    "top-p": (_top_p, "top_p", 1),
    "typical": (_typical, "typical_p", 1),
}
"""By method, in the order of ``combined``: what makes the test of which tokens stay, its setting, and the value of that
which keeps all."""


def _parts(sampling: Sampling) -> tuple[str, ...]:
    method = sampling.sampling_method
    return ("min-p", "top-k", "top-p") if method == "combined" else (method,)


def _reaching(weights: Tensor, share: Tensor) -> Tensor:
    """[rows, 1] the first place by which the weights [rows, n] have come to this share [rows, 1] of their sum."""
    sums = _summed(weights)
    return (sums < share * sums[:, -1:]).sum(-1, keepdim=True).clamp(max=weights.shape[-1] - 1)


def _summed(weights: Tensor) -> Tensor:
    return weights.cumsum(-1, dtype=_wide(weights.device))


def _wide(device: torch.device) -> torch.dtype:
    """What running sums over a vocabulary are kept in; Apple's GPUs have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64
