"""Half precision: rows in a batch are rounded otherwise than alone, and may choose otherwise only between near ties."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mechanex.bundled import dataset_path
from mechanex.engine.datasets import read_pairs
from mechanex.engine.decode.request import Steer, TextRequest
from mechanex.engine.decode.row import Row
from mechanex.engine.decode.run import decode
from mechanex.engine.intervention import Edit
from mechanex.engine.models import adapter_for
from mechanex.engine.models.resolve import LoadedModel, load

N_ROWS, N_NEW = 16, 24
VECTOR = torch.randn(128, generator=torch.Generator().manual_seed(0))
# Of the largest logit: what sums of another order may differ by, a few of the steps of bfloat16.
NEAR = 4 * 2.0**-8
# Of all tokens: how many may be chosen otherwise. The bundled model has many words that are as likely as each other.
SHARE = 0.03


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load("mx-tiny", backend="transformers", dtype="bfloat16")


def written(loaded: LoadedModel, requests: list[TextRequest]) -> list[list[int]]:
    rows = [Row(one, loaded.tokenizer, (), prompt=(i, len(requests))) for i, one in enumerate(requests)]
    decode(adapter_for(loaded.model), rows, 0)
    return [row.chosen for row in rows]


def logits_after(loaded: LoadedModel, ids: list[int], edit: Edit | None) -> Tensor:
    model: Any = loaded.model
    adapter = adapter_for(model)
    handle = adapter.on_residual(3, edit.apply if edit is not None else lambda hidden: None)
    try:
        with torch.no_grad():
            found: Tensor = model(torch.tensor([ids])).logits[0, -1].float()
    finally:
        handle.remove()
    return found


@pytest.mark.parametrize("steered", [False, True])
def test_rows_choose_otherwise_than_alone_only_between_near_ties(loaded: LoadedModel, steered: bool) -> None:
    prompts = dict.fromkeys(read_pairs(dataset_path("calm_angry"), split="train").prompts)
    ids = [loaded.tokenizer(one)["input_ids"] for one in list(prompts)[:N_ROWS]]
    edits = [Edit.add(VECTOR * (1 + i % 4)) if steered else None for i in range(N_ROWS)]
    requests = [
        TextRequest(one, N_NEW, steering=() if edit is None else (Steer(3, edit),))
        for one, edit in zip(ids, edits, strict=True)
    ]
    together = written(loaded, requests)
    alone = [written(loaded, [one])[0] for one in requests]
    differing = compared = 0
    for prompt, edit, mine, theirs in zip(ids, edits, together, alone, strict=True):
        at = next((i for i, pair in enumerate(zip(mine, theirs, strict=True)) if pair[0] != pair[1]), None)
        compared += N_NEW if at is None else at + 1
        if at is None:
            continue
        differing += 1
        logits = logits_after(loaded, [*prompt, *theirs[:at]], edit)
        gap = float(logits.max() - logits[[mine[at], theirs[at]]].min())
        assert gap <= NEAR * float(logits.abs().max()), (prompt, at, gap)
    assert compared > N_ROWS * N_NEW // 2 and differing <= SHARE * compared, f"{differing} of {compared}"
