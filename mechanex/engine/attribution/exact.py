"""Activation patching: what the metric gains from each clean activation, by running with it in place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..models.adapter import Handles, ModelAdapter
from ..ranks import by_stretch, current_ranks
from .metrics import check_metric
from .runs import Runs, ids_of
from .sites import Site, last_logits, rows_at_once, tapped

__all__ = ["Patch", "exact_scores", "put"]


@dataclass(frozen=True)
class Patch:
    """A clean activation that is put in place of a corrupted one.

    Args:
        site: where.
        head: one of the site's heads; None for all of it.
        position: of the corrupted prompt; None for all that have a counterpart.
    """

    site: Site
    head: int | None = None
    position: int | None = None


def exact_scores(adapter: ModelAdapter, runs: Runs, patches: Sequence[Patch]) -> Tensor:
    """[n] float32, the metric of the corrupted run with each patch alone in place, less the metric without it.

    Patches run as rows of a batch, as many in a pass as the device takes well.

    Args:
        adapter: the model.
        runs: both runs, with the patches' sites recorded.
        patches: what to put in place.
    """

    def scored(rows: range) -> list[float]:
        found: list[float] = _metric_with(adapter, runs, patches[rows.start : rows.stop]).float().tolist()
        return found

    at_once = rows_at_once(adapter, len(runs.pair.corrupted))
    found = by_stretch(current_ranks(adapter), len(patches), at_once, scored)
    return torch.tensor(found) - runs.corrupted_metric


def _metric_with(adapter: ModelAdapter, runs: Runs, patches: Sequence[Patch]) -> Tensor:
    rows, tokens = len(patches), len(runs.pair.corrupted)
    by_site: dict[Site, list[int]] = {}
    for row, patch in enumerate(patches):
        by_site.setdefault(patch.site, []).append(row)
    with torch.no_grad(), Handles() as handles:
        for site, of_site in by_site.items():
            handles.add(tapped(site, rows, tokens, put(runs, site, {row: patches[row] for row in of_site})))
        logits = last_logits(adapter, ids_of(adapter, runs.pair.corrupted, rows))
    return check_metric(runs.metric(logits), rows)


def put(runs: Runs, site: Site, patches: dict[int, Patch]) -> Any:
    """For ``tapped``: puts the clean activations of a site in place, in each row those of its patch."""
    pair, clean = runs.pair, runs.clean.values[site]

    def replaced(value: Tensor) -> Tensor:
        new = value.flatten(2).clone()
        width = new.shape[-1] // max(1, site.n_heads)
        for row, patch in patches.items():
            columns = (
                slice(None) if patch.head is None else slice(patch.head * width, (patch.head + 1) * width)
            )
            mine, theirs = pair.corrupted_at, pair.clean_at
            if patch.position is not None:
                mine, theirs = mine[mine == patch.position], theirs[mine == patch.position]
            new[row, mine, columns] = clean[theirs, columns].to(new)
        return new.reshape(value.shape)

    return replaced
