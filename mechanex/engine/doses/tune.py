"""A vector from contrastive examples with its dose inside: site, edit, tokens, and strength 1 for the chosen one."""

from __future__ import annotations

import os
from typing import Any

from torch import nn

from ..datasets import ContrastivePairs
from ..dose_record import DoseRecord
from ..models import adapter_for
from ..models.adapter import ModelAdapter
from ..vectors import SteeringVector
from .calibrate import dose_quantile, plain_pairs, with_record
from .forced import ForcedAnswers
from .sweep import sweep
from .swept import Swept

__all__ = ["tune", "tuned"]

# Of the chosen dose: what is seen of them is kept with the vector.
SEEN = (0.25, 0.5, 1.0, 1.5, 2.0)


def tune(
    model: nn.Module | ModelAdapter,
    data: ContrastivePairs | str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    seed: int = 0,
    **options: Any,
) -> SteeringVector:
    """Sweeps layers, strengths, edits and tokens, and gives the vector whose strength 1 is the chosen dose.

    Args:
        model: a Hugging Face or TransformerLens model.
        data: contrastive pairs, or their JSONL file.
        tokenizer: needed where the model carries none.
        seed: of everything that is drawn.
        options: of :func:`mechanex.engine.doses.sweep.sweep`.

    Returns:
        A vector of one layer, or of several that share the dose. It knows its edit, its tokens, how far it moves texts
        at which strength (``calibration``), and in ``metadata["recommendation"]`` what the sweep found.

    Raises:
        ValidationError: as ``sweep``.
    """
    found = sweep(model, data, tokenizer=tokenizer, seed=seed, **options)
    return tuned(model, found, tokenizer=tokenizer, seed=seed)


def tuned(
    model: nn.Module | ModelAdapter, found: Swept, *, tokenizer: Any = None, seed: int = 0
) -> SteeringVector:
    """The vector that a sweep recommends, with a record of how far it moves texts."""
    adapter = adapter_for(model)
    tokenizer = tokenizer if tokenizer is not None else adapter.tokenizer
    vector = found.vector()
    forced = ForcedAnswers(adapter, plain_pairs(adapter, tokenizer, None, None, 32, seed))
    settings = [tuple(vector.plan(adapter, strength).interventions) for strength in SEEN]
    seen = tuple(
        (strength, dose_quantile(one.kl)) for strength, one in zip(SEEN, forced.under(settings), strict=True)
    )
    vector.metadata["recommendation"] = found.sentence
    return with_record(vector, DoseRecord(dict(seen)[1.0], 1.0, seen, len(forced)))
