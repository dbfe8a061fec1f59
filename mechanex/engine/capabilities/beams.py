"""How the rows of a beam search may be run: batched and cached where that gives what whole passes give."""

from __future__ import annotations

import logging
import math
from typing import Literal, cast

import torch
from torch import Tensor

from ...errors import MechanexError
from ..beam_rows import Rows
from ..limits import PROBE_TOKENS, outgrown_length
from ..models.adapter import ModelAdapter
from .probing import close

__all__ = ["BeamForm", "beam_form"]

# "together": every prompt in one left-padded batch, with a cache; "apart": a batch and a cache for each prompt;
# "whole": a batch for each prompt, which is run from the start for every token.
BeamForm = Literal["together", "apart", "whole"]
CACHED: tuple[BeamForm, ...] = ("together", "apart")

_log = logging.getLogger(__name__)


def beam_form(adapter: ModelAdapter, longest: int) -> BeamForm:
    """The form found by trying, once per model and once more when a row first outgrows its window or the like."""
    outgrown = outgrown_length(adapter, longest)
    key = f"beam form beyond {outgrown} tokens" if outgrown else "beam form"
    if key not in adapter.findings:
        found = _probe(adapter, outgrown)
        if found is None:
            return "whole"
        adapter.findings[key] = found
    return cast(BeamForm, adapter.findings[key])


def _probe(adapter: ModelAdapter, outgrown: int | None) -> BeamForm | None:
    """Two prompts of unequal length, beams that are copied, dropped and swapped, in each form.

    None where the logits are NaN, which steering that is attached for now may cause.
    """
    generator = torch.Generator().manual_seed(0)
    vocab = int(adapter.config.vocab_size)

    def draw(n: int) -> Tensor:
        return torch.randint(vocab, (n,), generator=generator)

    prompts = [draw(PROBE_TOKENS - 3 + (outgrown or 0)).tolist(), draw(4).tolist()]
    steps = [
        (torch.tensor([0, 0, 0]), draw(3)),
        (torch.tensor([2, 0]), draw(2)),
        (torch.tensor([1, 0]), draw(2)),
    ]

    def run(rows: Rows) -> list[Tensor]:
        seen = [rows.logits()]
        for parents, tokens in steps:
            rows.extend(parents, tokens)
            seen.append(rows.logits())
        return seen

    truth: list[Tensor] | None = None
    for form in CACHED:
        try:
            if truth is None:
                alone = [run(Rows(adapter, [prompt], cached=False)) for prompt in prompts]
                truth = [torch.cat(logits) for logits in zip(*alone, strict=True)]
            if any(bool(logits.isnan().any()) for logits in truth):
                return None
            batches = [prompts] if form == "together" else [[prompt] for prompt in prompts]
            tried = [run(Rows(adapter, batch, cached=True)) for batch in batches]
        except MechanexError:
            raise
        except Exception as error:  # a model's own code may raise anything
            _log.debug("%s does not run beams %s with a cache: %s", adapter.model_id, form, error)
            continue
        if all(_agree(torch.cat(ours), theirs) for *ours, theirs in zip(*tried, truth, strict=True)):
            return form
    _log.info("%s can't reorder its cache; a beam search runs whole sequences.", adapter.model_id)
    return "whole"


def _agree(ours: Tensor, theirs: Tensor) -> bool:
    """Whether logits [prompts, beams, n_vocab] mean the same to rounding: what all of a row share means nothing."""
    barred = theirs == -math.inf
    if not torch.equal(ours == -math.inf, barred):
        return False
    a, b = ours.masked_fill(barred, 0.0), theirs.masked_fill(barred, 0.0)
    return close(a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True))
