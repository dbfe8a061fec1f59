"""Attribution patching: what the metric would gain from each clean activation, by its gradient on the corrupted run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..models.adapter import Handles, ModelAdapter
from ..pauses import pause
from .metrics import summed
from .runs import Runs, ids_of
from .sites import Site, last_logits, rows_at_once, tapped

__all__ = ["gradient_scores", "way_points"]


def way_points(steps: int) -> list[float]:
    """Where on the way from the corrupted to the clean input gradients are taken: at 0, and in equal steps short of 1.

    The run that is patched is one of the points, as in EAP-IG, and the other isn't.
    """
    return [step / steps for step in range(steps)]


def gradient_scores(
    adapter: ModelAdapter, runs: Runs, sites: Sequence[Site], embedding: Site, steps: int
) -> dict[Site, Tensor]:
    """(clean - corrupted activation) times gradient, for every site.

    Args:
        adapter: the model.
        runs: both runs, with the sites and the embedding recorded.
        sites: where.
        embedding: the module whose output is the input that is interpolated.
        steps: 1: the gradient of the corrupted run (attribution patching), as it was recorded. More: the mean of
            gradients on the way from the corrupted embeddings to the clean ones (EAP-IG, arXiv:2403.17806), packed as
            rows of a batch.

    Returns:
        For each site [T corrupted, 1], or [T corrupted, n_heads], float32.
    """
    points, tokens = way_points(steps), len(runs.pair.corrupted)
    totals = {site: torch.zeros_like(runs.corrupted.values[site], dtype=torch.float32) for site in sites}
    if runs.corrupted.live:
        points = []
        totals |= _summed(runs, sites, runs.corrupted.logits[None], runs.corrupted.live)
    chunk = rows_at_once(adapter, tokens)
    for start in range(0, len(points), chunk):
        pause()
        some = points[start : start + chunk]
        for site, gradient in _gradients(adapter, runs, sites, embedding, some).items():
            totals[site] += gradient
    return {site: _by_head(site, runs.delta(site) * totals[site] / steps) for site in sites}


def _gradients(
    adapter: ModelAdapter, runs: Runs, sites: Sequence[Site], embedding: Site, points: Sequence[float]
) -> dict[Site, Tensor]:
    """For each site [T, width], the sum over the points of the metric's gradient."""
    rows, tokens = len(points), len(runs.pair.corrupted)
    seen: dict[Site, Tensor] = {}
    with Handles() as handles:
        handles.add(tapped(embedding, rows, tokens, _between(runs, embedding, points)))
        for site in sites:
            handles.add(tapped(site, rows, tokens, _kept(seen, site)))
        logits = last_logits(adapter, ids_of(adapter, runs.pair.corrupted, rows))
    return _summed(runs, sites, logits, seen)


def _summed(
    runs: Runs, sites: Sequence[Site], logits: Tensor, seen: Mapping[Site, Tensor]
) -> dict[Site, Tensor]:
    """For each site that the metric hangs on [T, width], the sum of its gradients over the rows."""
    total = summed(runs.metric, logits)
    wanted = [site for site in sites if seen[site].requires_grad]
    found = torch.autograd.grad(total, [seen[site] for site in wanted], allow_unused=True)
    return {
        site: gradient.flatten(2).float().sum(0)
        for site, gradient in zip(wanted, found, strict=True)
        if gradient is not None
    }


def _between(runs: Runs, embedding: Site, points: Sequence[float]) -> Any:
    """Puts rows on the way from the corrupted to the clean input in the embedding's place, where gradients begin."""

    def interpolate(value: Tensor) -> Tensor:
        share = torch.tensor(points, device=value.device)[:, None, None]
        moved = value.detach().flatten(2).float() + share * runs.delta(embedding)
        return moved.to(value.dtype).reshape(value.shape).requires_grad_(True)

    return interpolate


def _kept(seen: dict[Site, Tensor], site: Site) -> Any:
    def keep(value: Tensor) -> Tensor:
        seen[site] = value
        return value.clone()  # the model may write into what it goes on with

    return keep


def _by_head(site: Site, product: Tensor) -> Tensor:
    return product.reshape(product.shape[0], max(1, site.n_heads), -1).sum(-1)
