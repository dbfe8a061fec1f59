"""Whether a model's upper layers can be run again from a kept residual stream."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from ...errors import MechanexError
from ..forward import packs_for
from ..models.adapter import ModelAdapter, undisturbed
from ..passes import Resumed, scored_hidden
from .probing import close, probe_pairs

__all__ = ["replay_agrees"]

_log = logging.getLogger(__name__)


def replay_agrees(adapter: ModelAdapter) -> bool:
    """Whether replaying the upper layers from a kept, edited residual gives what a whole pass gives; checked once."""
    if "replay" not in adapter.findings:
        try:
            agrees = _probe_replay(adapter)
        except MechanexError:
            raise
        except Exception as error:  # a model's own code may raise anything
            _log.debug("%s can't be replayed: %s", adapter.model_id, error)
            agrees = False
        if not agrees:
            _log.info("%s can't be resumed at a layer; every step runs the whole model.", adapter.model_id)
        adapter.findings["replay"] = agrees
    return bool(adapter.findings["replay"])


def _probe_replay(adapter: ModelAdapter) -> bool:
    pairs = probe_pairs(adapter, None)
    layer = adapter.n_layers // 2
    (pack,) = packs_for(adapter, pairs, batch_tokens=1 << 20)
    with torch.no_grad(), undisturbed(adapter.hf_model):
        found = Resumed(adapter, pack, layer)
        if found.residual is None:
            return False
        # An edit shows arguments that were computed from the residual itself and would be stale in a replay.
        kept = found.residual.float()
        shift = kept.std() * torch.linspace(-1, 1, adapter.d_model, device=kept.device)

        def edit(hidden: Tensor) -> Tensor:
            return hidden + shift.to(hidden)

        handle = adapter.on_residual(layer, edit)
        try:
            replayed, whole = found.scored(), scored_hidden(adapter, pack)
        finally:
            handle.remove()
    return close(replayed, whole)
