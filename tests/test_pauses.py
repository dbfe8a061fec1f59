"""Work that a server does beside text: it pauses often enough, and leaves the model to others as it found it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from mechanex.engine.attribution.edge_scores import scores_answer
from mechanex.engine.conditions.system_prompts import from_system_prompt
from mechanex.engine.doses.forced import ForcedAnswers
from mechanex.engine.hooks import Intervention
from mechanex.engine.intervention import Edit
from mechanex.engine.methods import vectors_by
from mechanex.engine.models import adapter_for
from mechanex.engine.models.adapter import ModelAdapter
from mechanex.engine.models.resolve import load
from mechanex.engine.pauses import pausing
from mechanex.engine.raag.answer import answer_questions
from mechanex.engine.sae.create import create
from mechanex.engine.score_pairs import score_pairs
from mechanex.engine.token_shifts import token_shifts

BOUND = 64
N = 12
PROMPTS = [f"{name} went to the market on Friday." for name in ("Anna", "Tom", "The baker")] * (N // 3)
SIDES = ([" It was a good day for all."] * N, [" It was a bad day for us."] * N)


@pytest.fixture(scope="module")
def tiny() -> tuple[ModelAdapter, Any]:
    loaded = load("mx-tiny", backend="transformers", device="cpu")
    return adapter_for(loaded.model), loaded.tokenizer


def pairs(tokenizer: Any) -> list[tuple[list[int], list[int]]]:
    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    return [
        (ids(prompt), ids(answer)) for side in SIDES for prompt, answer in zip(PROMPTS, side, strict=True)
    ]


Work = Callable[[ModelAdapter, Any], object]


def by(method: str, **options: Any) -> Work:
    return lambda adapter, tokenizer: vectors_by(method)(
        adapter, PROMPTS, *SIDES, [2], tokenizer=tokenizer, **options
    )


def attribution(**options: Any) -> Work:
    return lambda adapter, tokenizer: scores_answer(
        adapter, PROMPTS[0], PROMPTS[1], None, tokenizer=tokenizer, **options
    )


def steered(adapter: ModelAdapter) -> list[Intervention]:
    return [Intervention(2, Edit.add(torch.full((adapter.d_model,), 10.0)))]


WORKS: dict[str, Work] = {
    **{method: by(method) for method in ("caa", "pca", "probe")},
    "few-shot": by("few-shot", max_iters=2),
    "few-shot of many": lambda adapter, tokenizer: vectors_by("few-shot")(
        adapter, PROMPTS * 4, *(side * 4 for side in SIDES), [2], tokenizer=tokenizer, max_iters=2
    ),
    "a behavior": lambda adapter, tokenizer: create(adapter, "b", PROMPTS, *SIDES, tokenizer=tokenizer),
    "attribution": attribution(steps=8, align="tokens"),
    "exact attribution": attribution(method="exact", align="tokens"),
    "edges": attribution(edges=True, align="tokens"),
    "forced answers": lambda adapter, tokenizer: ForcedAnswers(adapter, pairs(tokenizer)),
    "settings": lambda adapter, tokenizer: ForcedAnswers(adapter, pairs(tokenizer)).under([steered(adapter)]),
    "steered scores": lambda adapter, tokenizer: score_pairs(
        adapter, pairs(tokenizer), edits=steered(adapter)
    ),
    "token shifts": lambda adapter, tokenizer: token_shifts(adapter, pairs(tokenizer), steered(adapter)),
    "documents": lambda adapter, tokenizer: answer_questions(
        adapter,
        tokenizer,
        [{"question": "Who went?"}],
        [{"text": text} for text in PROMPTS[:3]],
        max_tokens=4,
    ),
}


@pytest.mark.parametrize("name", WORKS)
def test_no_more_tokens_between_two_pauses_than_allowed(tiny: tuple[ModelAdapter, Any], name: str) -> None:
    adapter, tokenizer = tiny
    WORKS[name](adapter, tokenizer)  # what is found out once about a model is not what is bounded
    found, since = [0], [0]

    def count(module: torch.nn.Module, args: Sequence[torch.Tensor], _: object) -> None:
        since[0] += args[0].numel()
        found.append(since[0])

    def paused() -> None:
        since[0] = 0

    handle = adapter.hf_model.get_input_embeddings().register_forward_hook(count)
    try:
        with pausing(paused, BOUND):
            WORKS[name](adapter, tokenizer)
    finally:
        handle.remove()
    assert 0 < max(found) <= 2 * BOUND  # a text alone may be longer, and is read on two sides


# Runs locally alone, in passes of its own size.
UNBOUNDED: dict[str, Work] = {
    "a system prompt": lambda adapter, tokenizer: from_system_prompt(
        adapter,
        "Speak like a sailor.",
        [f"Question {i}?" for i in range(5)],
        tokenizer,
        answer_tokens=4,
        steps=3,
    ),
}


@pytest.mark.parametrize("name", [*WORKS, *UNBOUNDED])
def test_no_edit_is_on_the_model_at_a_pause(tiny: tuple[ModelAdapter, Any], name: str) -> None:
    adapter, tokenizer = tiny
    ids = torch.tensor([tokenizer(PROMPTS[0])["input_ids"]])
    plain = adapter.hf_model(ids).logits.detach()
    found = [adapter.hf_model(ids).logits.detach()]

    def paused() -> None:
        found.append(adapter.hf_model(ids).logits.detach())

    with pausing(paused, BOUND):
        (WORKS | UNBOUNDED)[name](adapter, tokenizer)
    assert len(found) > 1
    for one in found:
        torch.testing.assert_close(one, plain)
