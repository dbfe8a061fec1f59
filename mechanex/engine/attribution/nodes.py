"""Attribution patching: what the metric would gain from each clean activation, by its gradient on the corrupted run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..models.adapter import Handles, ModelAdapter
from ..ranks import current_ranks
from .metrics import summed
from .runs import Runs, ids_of
from .sites import Site, last_logits, rows_at_once, tapped

__all__ = ["by_head", "gradients", "way_points"]


def way_points(steps: int) -> list[float]:
    """Where on the way from the corrupted to the clean input gradients are taken: at 0, and in equal steps short of 1.

    The run that is patched is one of the points, as in EAP-IG, and the other isn't.
    """
    return [step / steps for step in range(steps)]


def gradients(
    adapter: ModelAdapter,
    runs: Runs,
    sites: Sequence[Site],
    embedding: Site,
    steps: int,
    dropped: Sequence[Sequence[Site]] = (),
) -> dict[Site, Tensor]:
    """The metric's gradient at every site.

    Args:
        adapter: the model.
        runs: both runs, with the sites and the embedding recorded.
        sites: where.
        embedding: the module whose output is the input that is interpolated.
        steps: 1: the gradient of the corrupted run (attribution patching). More: the mean of gradients on the way from
            the corrupted embeddings to the clean ones (EAP-IG, arXiv:2403.17806), packed as rows of a batch.
        dropped: for each gradient the sites that nothing comes back through, or none for one plain gradient
            (GradDrop, arXiv:2403.00745); packed as rows too.

    Returns:
        For each site [max(1, len(dropped)), T corrupted, width] float32.
    """
    n, tokens = max(1, len(dropped)), len(runs.pair.corrupted)
    totals = {
        site: torch.zeros((n, *value.shape), device=value.device)
        for site, value in ((site, runs.corrupted.values[site]) for site in sites)
    }
    if runs.corrupted.live:
        found = _found(runs, sites, runs.corrupted.logits[None], runs.corrupted.live)
        return {site: found.get(site, total) for site, total in totals.items()}
    every = [(point, cut) for point in way_points(steps) for cut in range(n)]
    ranks = current_ranks(adapter)
    with ranks.together():
        for stretch in ranks.each(
            ranks.stretches(len(every), rows_at_once(adapter, tokens)), len(every), "Gradients"
        ):
            some = every[stretch.start : stretch.stop]
            rows = torch.tensor([cut for _, cut in some])
            for site, gradient in _gradients(adapter, runs, sites, embedding, some, dropped).items():
                total = totals[site]
                total.index_add_(0, rows.to(total.device), gradient.to(total.device))
    return {site: ranks.total(total) / steps for site, total in totals.items()}


def _gradients(
    adapter: ModelAdapter,
    runs: Runs,
    sites: Sequence[Site],
    embedding: Site,
    every: Sequence[tuple[float, int]],
    dropped: Sequence[Sequence[Site]],
) -> dict[Site, Tensor]:
    """For each site that the metric hangs on [rows, T, width], the gradients at points with something dropped."""
    rows, tokens = len(every), len(runs.pair.corrupted)
    seen: dict[Site, Tensor] = {}
    with Handles() as handles:
        handles.add(tapped(embedding, rows, tokens, _between(runs, embedding, [point for point, _ in every])))
        for site in sites:
            handles.add(tapped(site, rows, tokens, _kept(seen, site)))
        # After the sites: what is dropped is dropped for them too.
        for index, cut in enumerate(dropped):
            mine = torch.tensor([one == index for _, one in every])
            for site in cut if mine.any() else ():
                handles.add(tapped(site, rows, tokens, _cut_off(mine)))
        logits = last_logits(adapter, ids_of(adapter, runs.pair.corrupted, rows))
    return _found(runs, sites, logits, seen)


def _found(
    runs: Runs, sites: Sequence[Site], logits: Tensor, seen: Mapping[Site, Tensor]
) -> dict[Site, Tensor]:
    total = summed(runs.metric, logits)
    wanted = [site for site in sites if seen[site].requires_grad]
    found = torch.autograd.grad(total, [seen[site] for site in wanted], allow_unused=True)
    return {
        site: gradient.flatten(2).float()
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


def _cut_off(rows: Tensor) -> Any:
    def cut(value: Tensor) -> Tensor:
        mask = rows.to(value.device).reshape(-1, *[1] * (value.dim() - 1))
        return torch.where(mask, value.detach(), value)

    return cut


def by_head(site: Site, product: Tensor) -> Tensor:
    """[…, width] summed over the width of each head: […, heads of the site, or 1]."""
    return product.reshape(*product.shape[:-1], max(1, site.n_heads), -1).sum(-1)
