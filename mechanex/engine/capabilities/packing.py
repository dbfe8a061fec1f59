"""The form of packed input that a model takes rightly."""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from typing import Literal, cast

import torch

from ...errors import MechanexError
from ..limits import outgrown_length, window_of
from ..models.adapter import ModelAdapter, undisturbed
from ..pack import TREES, Pack, build_packs
from ..passes import scored_hidden
from ..regimes import regimes_of
from .probing import close, probe_pairs

__all__ = ["PackForm", "packing_form"]

# Tree masks, given as one or by kind of layer; "padded": one text a row; "apart": one text a pass.
PackForm = Literal["plain", "window", "dict", "padded", "apart"]

_log = logging.getLogger(__name__)


def packing_form(adapter: ModelAdapter, longest: int) -> PackForm:
    """The form of packed input that this model computes rightly for paths of up to ``longest`` tokens.

    Decided once per model, and once more when a path first outgrows its attention window, or another length at which it
    may change what it does.
    """
    outgrown = outgrown_length(adapter, longest)
    key = f"form beyond {outgrown} tokens" if outgrown else "form"
    form = adapter.findings.get(key)
    if form is None:
        form = adapter.findings[key] = _probe_forms(adapter, outgrown)
    return cast(PackForm, form)


def _probe_forms(adapter: ModelAdapter, outgrown: int | None) -> PackForm:
    window = window_of(adapter)
    pairs = probe_pairs(adapter, outgrown)
    with torch.no_grad(), undisturbed(adapter.hf_model):
        try:
            alone = [
                scored_hidden(adapter, build_packs([pair], layout="padded")[0].to(adapter.device))
                for pair in pairs
            ]
        except MechanexError:
            raise
        except (
            Exception
        ) as error:  # a model's own code may raise anything, here at a probe past its last position
            _log.info("%s could not run the probe (%s); it runs padded rows.", adapter.model_id, error)
            return "padded"
        n_tokens = sum(len(p) + len(c) for p, c in pairs)
        lengths = regimes_of(adapter.hf_model, [len(p) + len(c) for p, c in pairs])
        (tree,) = build_packs(pairs, row_tokens=n_tokens, batch_tokens=n_tokens, apart=lengths)
        (rows,) = build_packs(pairs, layout="padded", batch_tokens=sys.maxsize)
        tried: list[tuple[PackForm, Pack]] = [(mask, replace(tree, mask=mask)) for mask in TREES]
        for form, pack in [*tried, ("padded", rows)]:
            if form == "window" and (window is None or window > (outgrown or 0)):
                continue
            try:
                packed = scored_hidden(adapter, pack.to(adapter.device))
            except MechanexError:
                raise
            except Exception as error:  # as above
                _log.debug("%s does not take the packed form %r: %s", adapter.model_id, form, error)
                continue
            pair = pack.pair.to(packed.device)
            if all(close(packed[pair == i], truth) for i, truth in enumerate(alone)):
                if form == "padded":
                    _log.info(
                        "%s can't take a tree mask; it runs one padded sequence per row.", adapter.model_id
                    )
                return form
    _log.info("%s gives a text other results among others; it runs one text at a time.", adapter.model_id)
    return "apart"
