"""How steering moves the next token's distribution along given texts, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ValidationError
from .capabilities.unembedding import unembedding_agrees
from .divergence import log_probabilities, shift
from .forward import packs_for, scored_logits
from .hooks import Intervention, SteeringPlan
from .models.adapter import ModelAdapter, exclusive, undisturbed
from .pack import Pair
from .passes import scored_hidden
from .pauses import pass_tokens, pause

__all__ = ["Likeliest", "TokenShift", "token_shifts"]

Likeliest = tuple[tuple[int, float], ...]
"""Token ids with their natural log-probabilities, the likeliest first."""

_PACK_TOKENS = 512
_LOGITS = 1 << 23  # numbers that are held at once


@dataclass(frozen=True)
class TokenShift:
    """One token of a text, and what it was predicted from.

    Attributes:
        token: its id.
        kl: nats, KL(steered‖plain) of the distribution that it was predicted from, before temperature.
        plain, steered: its natural log-probability.
        plain_top, steered_top: the likeliest tokens.
    """

    token: int
    kl: float
    plain: float
    steered: float
    plain_top: Likeliest
    steered_top: Likeliest


def token_shifts(
    adapter: ModelAdapter,
    pairs: Sequence[Pair],
    steered: Sequence[Intervention],
    *,
    plain: Sequence[Intervention] = (),
    top: int = 5,
) -> list[list[TokenShift]]:
    """What steering does to every token of given answers; two passes over one pack of them.

    Args:
        adapter: the model.
        pairs: (prompt ids, answer ids), neither empty.
        steered: the edits; they name no rows and no mask.
        plain: edits of the side that it is compared with; none by default.
        top: how many of the likeliest tokens are told.

    Returns:
        The tokens of each answer.

    Raises:
        ValidationError: an edit under a condition on prompts, which is decided where text is written, or edits so
            strong that the logits are NaN or infinite.
    """
    if any(one.condition is not None for one in (*plain, *steered)):
        raise ValidationError(
            "a vector with a condition is decided where text is written, so given texts can't be compared under it: "
            "leave the condition out."
        )
    plans = [SteeringPlan(list(edits)) for edits in (plain, steered)]
    found: list[list[TokenShift]] = [[] for _ in pairs]
    with exclusive(adapter), undisturbed(adapter.hf_model), torch.no_grad():
        # What the model can do is found out before it is steered.
        packs = packs_for(adapter, pairs, batch_tokens=pass_tokens(_PACK_TOKENS), scoring=True)
        whole = not unembedding_agrees(adapter)
        for pack in packs:
            both = []
            for plan in plans:
                pause()
                with plan.apply(adapter):
                    both.append((scored_logits if whole else scored_hidden)(adapter, pack))
            # Tokens of one pair are all in one pack and in order there.
            vocabulary = both[0].shape[-1] if whole else adapter.unembedding.weight.shape[0]
            step = max(1, _LOGITS // (2 * vocabulary))
            owners, targets = pack.pair.tolist(), pack.target
            for first in range(0, len(owners), step):
                part = slice(first, first + step)
                rows = [
                    log_probabilities(one[part] if whole else adapter.unembedding.logits(one[part]))
                    for one in both
                ]
                shifts = _shifts(adapter, rows[0], rows[1], targets[part], top)
                for owner, one in zip(owners[part], shifts, strict=True):
                    found[owner].append(one)
    return found


def _shifts(
    adapter: ModelAdapter, plain: Tensor, steered: Tensor, targets: Tensor, top: int
) -> list[TokenShift]:
    kl = shift(steered, plain)
    if not bool(torch.isfinite(kl).all()):
        raise ValidationError(
            f"The steered logits of {adapter.model_id} are NaN or infinite: steer less, or check the vector."
        )
    at = targets.to(plain.device)[:, None]
    chosen = [side.gather(-1, at)[:, 0].tolist() for side in (plain, steered)]
    likeliest = [_likeliest(side, top) for side in (plain, steered)]
    return [TokenShift(*one) for one in zip(targets.tolist(), kl.tolist(), *chosen, *likeliest, strict=True)]


def _likeliest(rows: Tensor, top: int) -> list[Likeliest]:
    values, tokens = rows.topk(min(top, rows.shape[-1]))
    return [
        tuple(zip(ids, logprobs, strict=True))
        for ids, logprobs in zip(tokens.tolist(), values.tolist(), strict=True)
    ]
