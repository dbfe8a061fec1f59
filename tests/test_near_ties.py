"""Rows of a batch in bfloat16, where other shapes round otherwise: they differ from each alone at near ties only."""

from __future__ import annotations

import copy
from typing import Any

import torch
from families import N_VOCAB, build, tiny_tokenizer

from mechanex.engine.decode.request import TextRequest
from mechanex.engine.decode.row import Row
from mechanex.engine.decode.run import decode
from mechanex.engine.models import adapter_for

N_ROWS, N_NEW = 24, 24
NEAR = (
    4 * torch.finfo(torch.bfloat16).eps
)  # of the best logit: its own rounding, and that of what it is made of


def written(model: Any, prompts: list[list[int]]) -> list[list[int]]:
    rows = [Row(TextRequest(ids, N_NEW), tiny_tokenizer(), ()) for ids in prompts]
    decode(adapter_for(model), rows, 0)
    return [row.chosen for row in rows]


@torch.no_grad()
def gap(model: Any, ids: list[int], one: int, other: int) -> float:
    """How far two tokens' logits lie apart behind this text, as a share of the highest."""
    logits = model(torch.tensor([ids])).logits[0, -1].float()
    return float((logits[one] - logits[other]).abs() / logits.max())


def test_rows_in_bfloat16_differ_from_each_alone_at_near_ties_only() -> None:
    model = copy.deepcopy(build("llama")).to(torch.bfloat16)
    drawn = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, N_VOCAB, (6 + i % 5,), generator=drawn).tolist() for i in range(N_ROWS)]
    alone = [written(model, [ids])[0] for ids in prompts]
    n_same = 0
    for ids, own, found in zip(prompts, alone, written(model, prompts), strict=True):
        if own == found:
            n_same += 1
            continue
        # Behind the first difference they are different texts.
        k = next(i for i in range(N_NEW) if own[i] != found[i])
        assert gap(model, [*ids, *own[:k]], own[k], found[k]) <= NEAR
    assert n_same >= N_ROWS * 2 // 3, (n_same, N_ROWS)  # were rows mixed up, hardly one would be the same
