"""What callers run: pairs laid out as a model takes them, and scored by the way that agrees with the model's own."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ..errors import ValidationError
from ..ops.logprob import completion_logprob
from .capabilities.packing import packing_form
from .capabilities.unembedding import unembedding_agrees, watch_unembedding
from .intervention import compute_dtype
from .limits import check_length, window_of
from .models.adapter import ModelAdapter
from .pack import ROW_TOKENS, TREES, Mask, Pack, Pair, build_packs, usual_tokens
from .passes import run_pack, scored_hidden
from .regimes import regimes_of

__all__ = ["chosen_logprobs", "packs_for", "scored_logits", "scored_logprobs"]

# How long a tree may become, in prompts, before the prompt is run once more in another: a fifth more work at most. On a
# CPU 3 to 10 are equally fast.
TREE_PROMPTS = 6
# Most memory that a pack's tree masks take together: a mask grows with the square of the row.
MASK_BYTES = 1 << 29


def packs_for(
    adapter: ModelAdapter,
    pairs: Sequence[Pair],
    *,
    groups: Sequence[Any] | None = None,
    row_tokens: int = ROW_TOKENS,
    batch_tokens: int | None = None,
    scoring: bool = False,
    processes: int = 1,
) -> list[Pack]:
    """Packs for this model: trees where it can take them, padded rows where not; on the model's device.

    The first call for a model checks that packed results equal one-by-one results (see :mod:`.capabilities.packing`).

    Args:
        adapter: the model.
        pairs, groups, row_tokens: as in :func:`.pack.build_packs`.
        batch_tokens: most tokens of a pack, trees included, unless a pair alone is longer; None for what suits the
            device.
        processes: how many will share the packs: at least as many, where there is enough to run.
        scoring: lay out only what completions are scored from, and let the completions of a long prompt stay together.

    Raises:
        ValidationError: no pairs, or an empty prompt or completion.
    """
    if not pairs:
        raise ValidationError("There is nothing to run: no (prompt, completion) pairs were given.")
    most_tree = sys.maxsize if batch_tokens is None else batch_tokens
    if batch_tokens is None:
        batch_tokens = usual_tokens(adapter.device)
    longest = max(len(p) + len(c) for p, c in pairs) - int(scoring)
    check_length(adapter, longest)
    # A prompt of many completions is mostly one list.
    adapter.check_token_ids(chain.from_iterable({id(ids): ids for pair in pairs for ids in pair}.values()))
    # A pair that is alone needs no tree mask, and may leave out its last token where others don't matter either.
    alone = len(pairs) == 1
    form = "padded" if alone and not scoring else packing_form(adapter, 1 if alone else longest)
    if form == "apart":
        batch_tokens = 1
    elif alone:
        form = "padded"
    window = window_of(adapter)
    widest = min(window if window is not None and longest <= window else sys.maxsize, most_tree)
    row_tokens = min(row_tokens, widest)
    mask_bytes = adapter.dtype.itemsize * (2 if form == "dict" else 1)

    def tree_tokens(prompt_tokens: int) -> int:
        return min(max(row_tokens, TREE_PROMPTS * prompt_tokens), widest) if scoring else row_tokens

    regimes = regimes_of(adapter.hf_model, [len(p) + len(c) for p, c in pairs])

    def built(batch_tokens: int) -> list[Pack]:
        return build_packs(
            pairs,
            layout="padded" if form in ("padded", "apart") else "tree",
            groups=groups,
            row_tokens=row_tokens,
            batch_tokens=batch_tokens,
            tree_tokens=tree_tokens,
            last_tokens=not scoring or form == "apart",
            apart=regimes,
            mask_entries=MASK_BYTES // mask_bytes,
        )

    packs = built(batch_tokens)
    if processes > 1 and len(packs) < 4 * processes:
        # Few large packs can't be dealt evenly.
        total = sum(pack.input_ids.numel() for pack in packs)
        packs = built(min(batch_tokens, max(total // (2 * processes), row_tokens)))
    device = adapter.device

    def mask_of(pack: Pack) -> Mask:
        if pack.layout != "tree":
            return "plain"
        own = form if pack.longest == longest else packing_form(adapter, pack.longest)
        return own if own in TREES else "plain"

    return [replace(pack, mask=mask_of(pack)).to(device) for pack in packs]


def scored_logits(adapter: ModelAdapter, pack: Pack, hidden: Tensor | None = None, **extra: Any) -> Tensor:
    """[N, n_vocab] logits that predict the pack's completion tokens, in the pack's order.

    Args:
        adapter: the model.
        pack: what to run.
        hidden: [N, d_model] from :class:`Resumed`, to unembed instead of running the pack.
        extra: further keyword arguments of the model's call.
    """
    if hidden is None:
        if not unembedding_agrees(adapter):
            logits: Tensor = run_pack(adapter, pack, **extra).logits
            return pack.predictors_of(logits)
        hidden = scored_hidden(adapter, pack, **extra)
    return adapter.unembedding.logits(hidden)


def scored_logprobs(
    adapter: ModelAdapter, pack: Pack, hidden: Tensor | None = None, *, coldness: float = 1.0, **extra: Any
) -> Tensor:
    """[N] natural log-probabilities of the pack's completion tokens, in the pack's order, float32 or float64.

    No logits are stored where the adapter's unembedding is the model's own and needs no gradient.

    Args:
        adapter: the model.
        pack: what to run.
        hidden: [N, d_model] from :class:`Resumed`, to score instead of running the pack.
        coldness: multiplies the logits.
        extra: further keyword arguments of the model's call.
    """
    if hidden is None:
        if pack.input_ids.shape[0] == 1 and adapter.findings.get("unembedding") is None:
            logits, hidden = watch_unembedding(adapter, pack, lambda: run_pack(adapter, pack, **extra))
            if hidden is None:
                return chosen_logprobs(logits, pack.target, coldness)
        elif unembedding_agrees(adapter):
            hidden = scored_hidden(adapter, pack, **extra)
        else:
            return chosen_logprobs(scored_logits(adapter, pack, **extra), pack.target, coldness)
    head = adapter.unembedding
    hidden, target = hidden.to(head.weight.device), pack.target.to(head.weight.device)
    learns = head.weight.requires_grad or (head.bias is not None and head.bias.requires_grad)
    if (learns and torch.is_grad_enabled()) or head.weight.dtype != hidden.dtype:
        return chosen_logprobs(head.logits(hidden), target, coldness)
    return completion_logprob(
        hidden, head.weight, target, head.bias, head.scale, head.softcap, coldness=coldness
    )


def chosen_logprobs(logits: Tensor, target: Tensor, coldness: float = 1.0) -> Tensor:
    """[N] log-probabilities of ``target`` under ``logits`` [N, n_vocab], float32 or float64."""
    wide = logits.to(compute_dtype(logits.dtype)) * coldness
    return wide.log_softmax(-1).gather(1, target.to(wide.device)[:, None])[:, 0]
