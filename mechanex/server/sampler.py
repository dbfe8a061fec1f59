"""Choosing the next token of every row of a batch, each by its own rules, as each would choose alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..engine.sampling import Sampling
from ..errors import MechanexError, ValidationError
from .request import TokenLogprob
from .row import Row

__all__ = ["are_sound", "choose", "logprobs_of", "not_finite"]


def choose(rows: Sequence[Row], logits: Tensor) -> list[tuple[int, TokenLogprob | None] | MechanexError]:
    """The next token of each row.

    Log-probabilities are those of the model, before penalties, biases, temperature and sampling.

    Args:
        rows: the rows of the batch.
        logits: [rows, vocabulary] of any floating dtype.

    Returns:
        For each row its token and, where it asked for one, the log-probability; an error for a row whose logits
        aren't finite, which leaves the others alone.
    """
    logits = logits.float()
    scores = _adjusted(rows, logits)
    best, tokens = scores.max(-1)
    # An infinite edit or a damaged weight shows as NaN or infinity at the top.
    sound = best.isfinite().tolist()
    chosen: list[int] = tokens.tolist()
    groups: dict[Sampling, list[int]] = {}
    for i, row in enumerate(rows):
        if sound[i] and row.request.sampling.sampling_method != "greedy":
            groups.setdefault(row.request.sampling, []).append(i)
    for sampling, members in groups.items():
        part = scores[members] if len(members) < len(rows) else scores
        for warper in sampling.warpers():
            part = warper(None, part)
        for i, shares in zip(members, part.softmax(-1), strict=True):
            drawn = torch.multinomial(shares, 1, generator=rows[i].generator(shares.device))
            chosen[i] = int(drawn)
    asked = [i for i, row in enumerate(rows) if sound[i] and row.request.logprobs is not None]
    logprobs: dict[int, TokenLogprob] = {}
    if asked:
        most = [rows[i].request.logprobs or 0 for i in asked]
        found = logprobs_of(logits[asked], [chosen[i] for i in asked], most)
        logprobs = dict(zip(asked, found, strict=True))
    return [(chosen[i], logprobs.get(i)) if sound[i] else not_finite(rows[i]) for i in range(len(rows))]


def are_sound(logits: Tensor) -> bool:
    """Whether logits [n, vocabulary] are numbers; single ones of minus infinity are, some models mask tokens so."""
    return bool(logits.amax(-1).isfinite().all())


def not_finite(row: Row) -> MechanexError:
    """The end of a row whose logits are NaN or infinite."""
    if not row.request.steering:
        return MechanexError("the model's logits are not finite: its weights are damaged.", 500)
    return ValidationError(
        "the model's logits are not finite: the steering is too strong for the model's dtype; try a smaller strength.",
        400,
        {"param": "steering_strength"},
    )


def logprobs_of(logits: Tensor, tokens: Sequence[int], most: Sequence[int]) -> list[TokenLogprob]:
    """Natural log-probabilities of the tokens, and of the ``most[i]`` likeliest ones.

    Args:
        logits: [n, vocabulary].
        tokens: n token ids.
        most: how many of the likeliest to name, for each.
    """
    shares = logits.float().log_softmax(-1)
    own = shares.gather(1, torch.tensor(tokens, device=shares.device)[:, None])[:, 0].tolist()
    depth = min(max(most, default=0), shares.shape[-1])
    values: list[list[float]] = [[]] * len(tokens)
    indices: list[list[int]] = [[]] * len(tokens)
    if depth:
        top = shares.topk(depth, dim=-1)
        values, indices = top.values.tolist(), top.indices.tolist()
    return [
        TokenLogprob(token, logprob, tuple(zip(ids[:n], shares_[:n], strict=True)))
        for token, logprob, ids, shares_, n in zip(tokens, own, indices, values, most, strict=True)
    ]


def _adjusted(rows: Sequence[Row], logits: Tensor) -> Tensor:
    """The logits with every row's biases and penalties; the given ones are left alone."""
    places: list[int] = []
    tokens: list[int] = []
    changes: list[float] = []
    for i, row in enumerate(rows):
        request = row.request
        for token, bias in request.logit_bias:
            places.append(i)
            tokens.append(token)
            changes.append(bias)
        if request.frequency_penalty or request.presence_penalty:
            for token, times in row.counts.items():
                places.append(i)
                tokens.append(token)
                changes.append(-(request.frequency_penalty * times + request.presence_penalty))
    if not places:
        return logits
    device = logits.device
    where = (torch.tensor(places, device=device), torch.tensor(tokens, device=device))
    return logits.index_put(where, torch.tensor(changes, device=device), accumulate=True)
