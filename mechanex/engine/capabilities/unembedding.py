"""Whether a model's logits are the adapter's unembedding of its final hidden states."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...errors import MechanexError
from ..attaching import before
from ..models.adapter import ModelAdapter, undisturbed
from ..pack import Pack, build_packs
from ..passes import run_pack, scored_hidden
from .probing import close, probe_pairs

__all__ = ["unembedding_agrees", "watch_unembedding"]

_log = logging.getLogger(__name__)


def unembedding_agrees(adapter: ModelAdapter) -> bool:
    """Whether the adapter's unembedding of hidden states gives the model's own logits; checked once."""
    if not adapter.unembeds:
        return False
    agrees = adapter.findings.get("unembedding")
    if agrees is None:
        (pack,) = build_packs(probe_pairs(adapter, None)[:1], layout="padded")
        pack = pack.to(adapter.device)
        try:
            with torch.no_grad(), undisturbed(adapter.hf_model):
                ours = adapter.unembedding.logits(scored_hidden(adapter, pack))
                theirs = run_pack(adapter, pack).logits
                agrees = close(ours, pack.predictors_of(theirs).to(ours))
        except MechanexError:
            raise
        except Exception as error:  # weights that are elsewhere between calls, say
            _log.debug("%s does not unembed by itself: %s", adapter.model_id, error)
            agrees = False
        if not agrees:
            _log.info(
                "%s has an unembedding of its own kind; logits come from whole passes.", adapter.model_id
            )
        adapter.findings["unembedding"] = agrees
    return bool(agrees)


def watch_unembedding(
    adapter: ModelAdapter, pack: Pack, run: Callable[[], Any]
) -> tuple[Tensor, Tensor | None]:
    """[N, n_vocab] logits for the pack's completion tokens from the model's own pass, which serves as the probe too.

    So what is attached to the model sees one pass, the one that was asked for. Beside the logits, the [N, d_model]
    hidden states that the adapter's unembedding makes them from, as in all later passes; None where it doesn't.

    Args:
        adapter: the model.
        pack: what is run.
        run: calls the model.
    """
    seen: list[Tensor] = []
    head = adapter.head
    handle = None if head is None else before(head, lambda _, args: seen.extend(args[:1]), kwargs=False)
    try:
        logits: Tensor = run().logits
    finally:
        if handle is not None:
            handle.remove()
    theirs = pack.predictors_of(logits)
    if not (seen and adapter.unembeds and bool(theirs.isfinite().all())):
        return theirs, None
    hidden = pack.predictors_of(seen[0])
    with torch.no_grad():
        ours = adapter.unembedding.logits(hidden)
        agrees = close(ours, theirs.to(ours))
    adapter.findings["unembedding"] = agrees
    return theirs, hidden if agrees else None
