"""A vector in a system prompt's place: trained gates do what the prompt does, on chats that they haven't seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import build, n_hooks, tiny_tokenizer
from test_real_model import loaded as loaded

from mechanex import SteeringVector, ValidationError
from mechanex.engine.conditions.system_prompts import from_system_prompt, prompt_shift
from mechanex.engine.models.resolve import load

ANGRY = "Everyone was angry. The waiter shouted furiously, and Peter was full of rage."
OPENINGS = [
    f"{name} {verb} {place}."
    for name in ("Anna", "Peter", "Helen", "Tom")
    for verb, place in (
        ("went to", "the market"),
        ("came home from", "the museum"),
        ("waited at", "the station"),
        ("wrote about", "the opera"),
        ("walked through", "the park"),
        ("spoke of", "the river"),
    )
]
UNSEEN = [
    "Rosa looked at the old bridge.",
    "On Monday Ben cooked a soup.",
    "Nora met the neighbour.",
    "Emma opened the door of the shop.",
]


def test_the_prompts_effect_is_recovered_on_chats_that_were_not_seen(tmp_path: Path) -> None:
    tiny = load("mx-tiny", backend="transformers")
    vector = from_system_prompt(tiny.model, ANGRY, OPENINGS, tiny.tokenizer, steps=60)
    assert n_hooks(tiny.model) == 0
    assert vector.method == "gated" and float(vector.metadata["recovered"]) > 0.5
    assert not any(p.requires_grad and p.grad is not None for p in tiny.model.parameters())
    vector.save(tmp_path / "angry.safetensors")
    vector = SteeringVector.load(tmp_path / "angry.safetensors")
    plain, steered = prompt_shift(tiny.model, ANGRY, vector, UNSEEN, tiny.tokenizer)
    assert plain > 0.05
    assert 1 - steered / plain > 0.5
    # The gates count: with the vector alone it is another thing.
    _, ungated = prompt_shift(tiny.model, ANGRY, SteeringVector(dict(vector)), UNSEEN, tiny.tokenizer)
    assert ungated > steered


def test_the_same_seed_gives_the_same_vector() -> None:
    model = build("llama")
    options: dict[str, Any] = {"steps": 3, "answer_tokens": 4, "layers": [1, 3]}
    found = [
        from_system_prompt(model, "He was calm.", OPENINGS[:6], tiny_tokenizer(), seed=seed, **options)
        for seed in (0, 0, 1)
    ]
    assert found[0] == found[1] != found[2]
    assert found[0].layers == (1, 3)


@pytest.mark.parametrize("family", ["gpt2", "bloom", "gemma2", "mamba"])
def test_it_is_trained_on_every_family(family: str) -> None:
    model = build(family)
    vector = from_system_prompt(
        model, "He was calm.", OPENINGS[:6], tiny_tokenizer(), steps=25, answer_tokens=6
    )
    plain, steered = prompt_shift(
        model, "He was calm.", vector, OPENINGS[:6], tiny_tokenizer(), answer_tokens=6
    )
    assert steered < plain


def test_what_can_not_be_learned_is_refused() -> None:
    model = build("llama")
    for prompt, prompts, match in (("", OPENINGS, "isn't empty"), ("x", OPENINGS[:3], "5 prompts")):
        with pytest.raises(ValidationError, match=match):
            from_system_prompt(model, prompt, prompts, tiny_tokenizer())
    with pytest.raises(ValidationError, match="Layer 9"):
        from_system_prompt(model, "x", OPENINGS, tiny_tokenizer(), layers=[9])


HELD_OUT = [
    "Why is the sky blue?",
    "Tell me about the moon.",
    "How do I bake a cake?",
    "What do you think of winter?",
    "How do I grow tomatoes?",
    "What is the best way to travel across Europe?",
    "Why do cats purr?",
    "How can I become a better writer?",
    "What is a volcano?",
    "Tell me a story about a lost key.",
]


@pytest.mark.real
def test_a_persona_of_a_real_model_is_recovered(loaded: Any) -> None:
    pirate = "You are a pirate. Answer every question as a pirate would, with pirate slang."
    vector = from_system_prompt(loaded.model, pirate, tokenizer=loaded.tokenizer)
    plain, steered = prompt_shift(loaded.model, pirate, vector, HELD_OUT, loaded.tokenizer, seed=9)
    assert plain > 0.2
    assert 1 - steered / plain >= 0.8
    assert torch.isfinite(torch.tensor(vector.norm()))
