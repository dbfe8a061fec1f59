"""Packed, scored and read, every family of transformers gives what each text alone gives."""

from __future__ import annotations

import pytest
import torch
from all_families import N_VOCAB, NAMES, build_small
from transformers import CONFIG_MAPPING

from mechanex.engine.forward import packs_for, scored_logits
from mechanex.engine.models import adapter_for

pytestmark = pytest.mark.long


def texts() -> list[tuple[list[int], list[int]]]:
    generator = torch.Generator().manual_seed(1)

    def draw(n: int) -> list[int]:
        return torch.randint(3, N_VOCAB, (n,), generator=generator).tolist()

    shared = draw(9)
    return [(shared, draw(3)), (shared, draw(1)), (draw(14), draw(4)), (draw(2), draw(5)), (draw(4), draw(2))]


@pytest.mark.parametrize("name", NAMES)
def test_a_family_packed_is_what_each_text_alone_is(name):
    if name not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {name}")
    model = build_small(name)
    adapter, pairs, seen = adapter_for(model), texts(), set()
    with torch.no_grad():
        for pack in packs_for(adapter, pairs, scoring=True):
            logits = scored_logits(adapter, pack)
            for i in pack.pair.unique().tolist():
                prompt, completion = pairs[i]
                whole = model(input_ids=torch.tensor([prompt + completion]), use_cache=False).logits
                truth = whole[0, len(prompt) - 1 : -1]
                assert truth.isfinite().all()
                off = (logits[pack.pair == i] - truth).norm(dim=-1) / truth.norm(dim=-1)
                assert off.max() < 1e-4
                seen.add(i)
    assert seen == set(range(len(pairs)))


def test_the_list_names_more_than_a_hundred_families():
    assert len(set(NAMES)) == len(NAMES) >= 105
