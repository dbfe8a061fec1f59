"""Knock-outs of chunks, packed, give what one whole pass per knock-out gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import build, sliding_family
from torch import Tensor

from mechanex.engine import continuing
from mechanex.engine.models import adapter_for
from mechanex.engine.raag import knockouts
from mechanex.engine.raag.knockouts import AnsweredPrompt, Knockouts

SPANS = [(1, 6), (6, 11), (11, 20), (20, 26)]
FAMILIES = ["llama", "gpt2", "qwen3", "gemma2", "cohere2", "falcon", "opt", "gpt_neox"]
UNMASKED = ["bloom", "mpt", "mamba"]


@pytest.fixture(params=["in passes of several texts", "going on from what was read"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to remove a chunk, on readings that are short enough for a test."""
    if request.param == "going on from what was read":
        monkeypatch.setattr(knockouts, "SHORT", 0)
        monkeypatch.setattr(knockouts, "LEAST_READ", 6)
        monkeypatch.setattr(continuing, "PART", 5)


def reading(seed: int = 0) -> AnsweredPrompt:
    ids = torch.randint(3, 380, (40,), generator=torch.Generator().manual_seed(seed)).tolist()
    return AnsweredPrompt(tuple(ids[:28]), tuple(ids[28:33]), tuple(ids[33:]))


def answered(model: Any, ids: tuple[int, ...], n: int, **more: Any) -> Tensor:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids]), use_cache=False, **more).logits[0]
    logprobs = logits.log_softmax(-1)
    return torch.stack([logprobs[i - 1, ids[i]] for i in range(len(ids) - n, len(ids))])


def removed_alone(model: Any, r: AnsweredPrompt, span: tuple[int, int]) -> Tensor:
    ids = r.context[: span[0]] + r.context[span[1] :] + r.question + r.answer
    return answered(model, ids, len(r.answer))


def blocked_alone(model: Any, r: AnsweredPrompt, span: tuple[int, int]) -> Tensor:
    """One pass with a mask of its own; these families take one mask for all layers at this length."""
    n = r.size
    seen = torch.ones(n, n, dtype=torch.bool).tril()
    seen[len(r.context) :, span[0] : span[1]] = False
    mask = torch.zeros(n, n).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]
    given: Any = mask
    if model.config.model_type in ("gemma2", "cohere2"):
        given = {"full_attention": mask, "sliding_attention": mask}
    positions = torch.arange(n)[None]
    return answered(model, r.prompt + r.answer, len(r.answer), attention_mask=given, position_ids=positions)


@pytest.mark.parametrize("name", FAMILIES)
def test_blocked_and_removed_are_what_a_pass_for_each_gives(name: str, way: None) -> None:
    model, r = build(name), reading()
    found_of = Knockouts(adapter_for(model), r)
    assert found_of.can_block
    found = found_of.blocked([(0, 0), *SPANS])
    assert found is not None
    plain = answered(model, r.prompt + r.answer, len(r.answer))
    torch.testing.assert_close(found[0], plain, atol=1e-4, rtol=0)
    blocked = torch.stack([blocked_alone(model, r, span) for span in SPANS])
    torch.testing.assert_close(found[1:], blocked, atol=1e-4, rtol=0)
    assert float((blocked - plain).abs().max()) > 0.01
    spans = [(0, 4), *SPANS]
    removed = torch.stack([removed_alone(model, r, span) for span in spans])
    torch.testing.assert_close(found_of.removed(spans), removed, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", UNMASKED)
def test_a_model_that_takes_no_such_mask_still_tells_removed_chunks(name: str, way: None) -> None:
    model, r = build(name), reading()
    found = Knockouts(adapter_for(model), r)
    assert not found.can_block
    removed = torch.stack([removed_alone(model, r, span) for span in SPANS])
    torch.testing.assert_close(found.removed(SPANS), removed, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_removed_chunks_are_exact_beyond_an_attention_window(name: str, way: None) -> None:
    model, r = sliding_family(name, 16), reading(1)
    removed = torch.stack([removed_alone(model, r, span) for span in SPANS])
    torch.testing.assert_close(Knockouts(adapter_for(model), r).removed(SPANS), removed, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_a_chunk_is_blocked_at_one_layer_only(name: str) -> None:
    model, r = build(name), reading()
    adapter = adapter_for(model)
    n = adapter.n_layers
    found = Knockouts(adapter, r)
    each = found.blocked([SPANS[1]] * n, list(range(n)))
    assert each is not None
    nothing = found.blocked([(0, 0)])
    assert nothing is not None
    # In the last layer, the chunk's absence is that of its values there: every layer differs from the others.
    assert len({round(float(row.sum()), 3) for row in [*each, nothing[0]]}) == n + 1
    alone = torch.cat([x for i in range(n) if (x := found.blocked([SPANS[1]], [i])) is not None])
    torch.testing.assert_close(each, alone, atol=1e-4, rtol=0)
