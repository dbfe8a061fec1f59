"""Scoring and extraction as a plain script does them, for comparison: one text at a time, or right-padded batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Ids = list[int]


def one_by_one(
    model: Any, prompts: Sequence[Ids], completions: Sequence[Sequence[Ids]], vector: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Sums of completions' log-probabilities and the gradient for ``vector``, one text at a time."""
    sums, gradient = [], None if vector is None else torch.zeros_like(vector)
    with torch.set_grad_enabled(vector is not None):
        for prompt, choices in zip(prompts, completions, strict=True):
            for choice in choices:
                ids = torch.tensor([prompt + choice], device=model.device)
                logprobs = model(ids).logits.log_softmax(-1)
                own = torch.tensor(choice, device=model.device)[:, None]
                scored = logprobs[0, len(prompt) - 1 : -1].gather(1, own)
                if vector is not None and gradient is not None:
                    gradient += torch.autograd.grad(scored.sum(), vector)[0]
                sums.append(scored.sum().detach())
    return torch.stack(sums), gradient


def padded(
    model: Any,
    prompts: Sequence[Ids],
    completions: Sequence[Sequence[Ids]],
    vector: Tensor | None = None,
    *,
    batch_size: int = 16,
) -> tuple[Tensor, Tensor | None]:
    """The same in right-padded batches of so many texts."""
    pairs = [(p, c) for p, choices in zip(prompts, completions, strict=True) for c in choices]
    sums, gradient = [], None if vector is None else torch.zeros_like(vector)
    with torch.set_grad_enabled(vector is not None):
        for start in range(0, len(pairs), batch_size):
            batch = pairs[start : start + batch_size]
            ids, mask, scored = _padded([(p, c, 1.0) for p, c in batch])
            ids, mask, scored = (t.to(model.device) for t in (ids, mask, scored))
            logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
            losses = functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
            found = -(losses * scored[:, 1:]).sum(1)
            if vector is not None and gradient is not None:
                gradient += torch.autograd.grad(found.sum(), vector)[0]
            sums.append(found.detach())
    return torch.cat(sums), gradient


def padded_means(
    model: Any,
    prompts: Sequence[Ids],
    positive: Sequence[Ids],
    negative: Sequence[Ids],
    *,
    batch_size: int = 32,
) -> Tensor:
    """[n_layers, d_model] mean differences: each answer with its prompt, sorted by length, so many texts a batch."""
    rows = [
        (p, a, sign)
        for side, sign in ((positive, 1), (negative, -1))
        for p, a in zip(prompts, side, strict=True)
    ]
    rows.sort(key=lambda row: len(row[0]) + len(row[1]))
    total = torch.zeros(model.config.num_hidden_layers, model.config.hidden_size, device=model.device)
    with torch.no_grad():
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            ids, mask, weight = _padded([(p, a, sign / len(a) / len(prompts)) for p, a, sign in batch])
            ids, mask, weight = (t.to(model.device) for t in (ids, mask, weight))
            states = model.model(
                input_ids=ids, attention_mask=mask, use_cache=False, output_hidden_states=True
            ).hidden_states
            for layer, hidden in enumerate(states[: model.config.num_hidden_layers]):
                total[layer] += torch.einsum("bt,btd->d", weight, hidden.float())
    return total


def _padded(batch: Sequence[tuple[Ids, Ids, float]]) -> tuple[Tensor, Tensor, Tensor]:
    """Ids and mask of prompts with their answers, right-padded, and each answer token's weight."""
    width = max(len(p) + len(a) for p, a, _ in batch)
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    mask, weight = torch.zeros_like(ids), torch.zeros(len(batch), width)
    for i, (p, a, amount) in enumerate(batch):
        n = len(p) + len(a)
        ids[i, :n], mask[i, :n] = torch.tensor(p + a), 1
        weight[i, len(p) : n] = amount
    return ids, mask, weight
