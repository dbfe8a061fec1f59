"""Encoded (prompt, completion) pairs through the model: packs laid out, steered, run, and put back in input order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ValidationError
from .capabilities.unembedding import unembedding_agrees
from .forward import chosen_logprobs, packs_for, scored_logits, scored_logprobs
from .given import as_finite
from .hooks import Intervention, SteeringPlan
from .intervention import Edit, widest
from .models.adapter import ModelAdapter, exclusive, undisturbed
from .pack import Pack, Pair
from .passes import scored_hidden
from .ranks import SINGLE, Ranks, current_ranks, dealt
from .vectors import SteeringVector

__all__ = ["CompletionLogprobs", "Edits", "score_pairs"]

Edits = SteeringPlan | SteeringVector | Mapping[int, Tensor] | Intervention | Iterable[Intervention]

# Rows of logits that are held at once where the likeliest token is asked for.
GREEDY_ROWS = 128


@dataclass(frozen=True, eq=False)
class CompletionLogprobs:
    """Natural log-probabilities of completions, in the order in which they were given.

    Attributes:
        sums: [n], of each completion: the sum over its tokens. float32, or float64 for float64 models.
        tokens: n tensors [n_tokens], of each token given those before it.
        token_ids: n lists of the completions' token ids.
        counts: completions of each prompt, so that ``sums.split(counts)`` goes by prompt.
        greedy: n bool tensors [n_tokens]: whether the token was the likeliest one; None unless asked for.
    """

    sums: Tensor
    tokens: list[Tensor]
    token_ids: list[list[int]]
    counts: list[int]
    greedy: list[Tensor] | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def __repr__(self) -> str:
        return f"CompletionLogprobs({len(self)} completions, sums={[round(s, 4) for s in self.sums[:8].tolist()]})"


def score_pairs(
    adapter: ModelAdapter,
    pairs: Sequence[Pair],
    *,
    counts: list[int] | None = None,
    coldness: float = 1.0,
    edits: Edits | None = None,
    differentiable: bool = False,
    plain: bool = False,
    greedy: bool = False,
    batch_tokens: int | None = None,
    progress: bool = False,
    model_kwargs: Mapping[str, Any] | None = None,
) -> CompletionLogprobs:
    """What :func:`mechanex.engine.score.completion_logprobs` does with encoded (prompt ids, completion ids) pairs.

    Args:
        adapter: the model.
        pairs: neither side empty.
        counts: ``CompletionLogprobs.counts``; one per pair by default.
        plain: run as a call of the model on each text alone would, for hooks and gradients of the caller's: whole
            texts, weights with their own ``requires_grad``, and for a single pair no other pass than its own.
        model_kwargs: further keyword arguments of the model's calls.
        coldness, edits, differentiable, greedy, batch_tokens, progress: as there.

    Raises:
        ValidationError: as there.
    """
    cold = as_finite(coldness)
    if cold is None:
        raise ValidationError(f"coldness is a finite number; got {coldness!r}.")
    extra = dict(model_kwargs or {})
    plan = None if edits is None else _plan(adapter, edits)
    gradients = torch.enable_grad if differentiable else torch.no_grad
    # Gradients that a caller asks for, and hooks of its own, are its own process's.
    ranks = SINGLE if differentiable or plain else current_ranks(adapter)
    with exclusive(adapter), undisturbed(adapter.hf_model, freeze=not plain), ranks.together():
        # What the model can do is found out before it is steered.
        packs = packs_for(
            adapter, pairs, batch_tokens=batch_tokens, scoring=not plain, processes=ranks.sharing
        )
        if not plain:
            unembedding_agrees(adapter)
        values: list[Tensor] = []
        likeliest: list[Tensor] = []
        for pack in dealt(packs, ranks, "Scoring", progress=progress):
            # Not around the loop: while it pauses, others' texts go through the model.
            steering: AbstractContextManager[Any] = nullcontext() if plan is None else plan.apply(adapter)
            with steering, gradients():
                if greedy:
                    found, first = _with_greedy(adapter, pack, cold, extra)
                    likeliest.append(first)
                else:
                    found = scored_logprobs(adapter, pack, coldness=cold, **extra)
                values.append(found)
    if ranks.sharing > 1:
        values, likeliest = _of_all(ranks, packs, values), _of_all(ranks, packs, likeliest)
    with gradients():
        result = _in_input_order(packs, values, likeliest, pairs, counts)
    if differentiable and not plain and not result.sums.requires_grad:
        raise ValidationError(
            "differentiable=True, but nothing that the scores depend on requires gradients: give edits whose tensors "
            "do, such as edits={layer: vector.requires_grad_()}."
        )
    return result


def _with_greedy(
    adapter: ModelAdapter, pack: Pack, coldness: float, extra: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    """[N] log-probabilities, and whether each target is the likeliest token."""
    whole = not unembedding_agrees(adapter)
    rows = (scored_logits if whole else scored_hidden)(adapter, pack, **extra)
    targets = torch.split(pack.target, GREEDY_ROWS)
    found = []
    for part, target in zip(torch.split(rows, GREEDY_ROWS), targets, strict=True):
        logits = part if whole else adapter.unembedding.logits(part)
        found.append(
            (chosen_logprobs(logits, target, coldness), logits.argmax(-1) == target.to(logits.device))
        )
    values, first = zip(*found, strict=True)
    return torch.cat(values), torch.cat(first)


def _of_all(ranks: Ranks, packs: Sequence[Pack], mine: list[Tensor]) -> list[Tensor]:
    """What was found of every pack, in the packs' order, of what each process found of its own; [] for nothing."""
    device = packs[0].input_ids.device
    by_rank = ranks.gathered([one.cpu() for one in mine])
    if not any(by_rank):
        return []
    sizes = [pack.input_ids.numel() for pack in packs]
    placed = {
        place: found
        for rank, theirs in enumerate(by_rank)
        for place, found in zip(Ranks(rank, ranks.size).share(sizes), theirs, strict=True)
    }
    return [placed[place].to(device) for place in range(len(packs))]


def _in_input_order(
    packs: Sequence[Pack],
    values: list[Tensor],
    likeliest: list[Tensor],
    pairs: Sequence[Pair],
    counts: list[int] | None,
) -> CompletionLogprobs:
    lengths = [len(completion) for _, completion in pairs]
    # Tokens of one pair are all in one pack and in order there.
    pair, order = torch.cat([pack.pair for pack in packs]).sort(stable=True)
    flat = torch.cat(values)
    pair, order = pair.to(flat.device), order.to(flat.device)
    flat = flat[order]
    wide = widest(flat.device)
    sums = torch.zeros(len(pairs), dtype=wide, device=flat.device).index_add(0, pair, flat.to(wide))
    greedy = list(torch.split(torch.cat(likeliest)[order], lengths)) if likeliest else None
    return CompletionLogprobs(
        sums.to(flat.dtype),
        list(torch.split(flat, lengths)),
        [list(completion) for _, completion in pairs],
        [1] * len(pairs) if counts is None else counts,
        greedy,
    )


def _plan(adapter: ModelAdapter, edits: Edits) -> SteeringPlan:
    if isinstance(edits, SteeringVector):
        return edits.plan(adapter)
    if isinstance(edits, Mapping):
        edits = [Intervention(layer, Edit.add(vector)) for layer, vector in edits.items()]
    elif isinstance(edits, Intervention):
        edits = [edits]
    elif not isinstance(edits, SteeringPlan):
        edits = list(edits) if isinstance(edits, Iterable) else [edits]
    plan = edits if isinstance(edits, SteeringPlan) else SteeringPlan(edits)
    for intervention in plan.interventions:
        if not isinstance(intervention, Intervention):
            raise ValidationError(
                "edits is a SteeringPlan, interventions, a SteeringVector or {layer: tensor}; "
                f"got {type(intervention).__name__}."
            )
        if intervention.mask is not None or intervention.rows is not None:
            raise ValidationError(
                "An edit names rows of a batch, but scoring lays out its own batches; steer by tokens, or score "
                "the completions that are steered differently in calls of their own."
            )
    return plan
