"""Conditional steering: a text is exactly the steered one where its prompt meets the condition, else the plain one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import D_MODEL, build, n_hooks, tiny_tokenizer
from test_real_model import loaded as loaded
from test_static_step import run
from test_terms import steers

from mechanex import SteeringVector, ValidationError
from mechanex.bundled import dataset_path, open_questions
from mechanex.engine.caa import caa_vectors
from mechanex.engine.conditions.fitting import fit_condition, prompt_means
from mechanex.engine.datasets import read_pairs
from mechanex.engine.decode.decoder import Decoder
from mechanex.engine.decode.prefixes import Prefixes
from mechanex.engine.decode.request import Steer, TextRequest
from mechanex.engine.decode.row import Row
from mechanex.engine.decode.run import decode
from mechanex.engine.generate import generate, generate_batch, stream
from mechanex.engine.models import adapter_for
from mechanex.engine.models.adapter import undisturbed
from mechanex.engine.models.resolve import load
from mechanex.engine.prompt_conditions import PromptCondition
from mechanex.engine.terms import TokenGate

MET = ("The morning was cold and", "The lawyer was not so sure, and the doctor")
UNMET = ("He knew every child by name, and the old man at the", "I am happy that you came. I am")
N = 6
EDITED = 2


def condition_of(model: Any, layer: int) -> PromptCondition:
    """One that MET meets and UNMET doesn't."""
    ids = [list(tiny_tokenizer()(text).input_ids) for text in (*MET, *UNMET)]
    means = prompt_means(adapter_for(model), ids, [layer])[layer]
    weight = means[:2].mean(0) - means[2:].mean(0)
    scores = means @ (weight / weight.norm())
    assert scores[:2].min() > scores[2:].max() + 0.01
    return PromptCondition(layer, weight, float(scores[:2].min() + scores[2:].max()) / 2)


def vector(strength: float = 4.0) -> SteeringVector:
    direction = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(5))
    return SteeringVector({EDITED: direction * strength})


def written(model: Any, prompts: tuple[str, ...], steering: tuple[Steer, ...]) -> list[list[int]]:
    requests = [
        TextRequest(list(tiny_tokenizer()(text).input_ids), max_tokens=N, steering=steering)
        for text in prompts
    ]
    rows = [Row(one, tiny_tokenizer(), (), prompt=(i, len(prompts))) for i, one in enumerate(requests)]
    decode(adapter_for(model), rows, 0)
    return [row.chosen for row in rows]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "bloom", "mamba"])
@pytest.mark.parametrize("layer", [1, 4])
def test_a_text_is_steered_where_its_prompt_meets_the_condition(family: str, layer: int) -> None:
    model = build(family)
    conditional = steers(vector().when(condition_of(model, layer)), model)
    always = steers(vector(), model)
    # In the same batch, and each alone: what others do changes nothing.
    mixed = (MET[0], UNMET[0], MET[1], UNMET[1])
    steered, plain = written(model, mixed, always), written(model, mixed, ())
    expected = [steered[0], plain[1], steered[2], plain[3]]
    assert all(a != b for a, b in zip(steered, plain, strict=True))
    assert written(model, mixed, conditional) == expected
    assert [written(model, (text,), conditional)[0] for text in mixed] == expected
    assert n_hooks(model) == 0


def test_conditions_of_one_request_are_decided_one_by_one() -> None:
    model = build("llama")
    first, second = condition_of(model, 1), condition_of(model, 4)
    never = PromptCondition(4, second.weight, 1.0)
    a, b, c = vector(4.0), vector(-3.0), vector(9.0)
    conditional = (*steers(a.when(first), model), *steers(b, model), *steers(c.when(never), model))
    both, one = (*steers(a, model), *steers(b, model)), steers(b, model)
    prompts = (MET[0], UNMET[0])
    assert written(model, prompts, conditional) == [
        written(model, prompts, both)[0],
        written(model, prompts, one)[1],
    ]


def test_prompts_that_are_read_in_pieces_are_decided_alike() -> None:
    model = build("llama")
    adapter = adapter_for(model)
    conditional = steers(vector().when(condition_of(model, 4)), model)
    prompts = (MET[1], UNMET[0])
    expected = written(model, prompts, conditional)
    prefixes = Prefixes(1 << 20)
    for options in (
        {"prefill_tokens": 3},
        {"prefixes": prefixes},
        {"prefixes": prefixes},
        {"form": "static"},
    ):
        requests = [
            TextRequest(list(tiny_tokenizer()(text).input_ids), max_tokens=N, steering=conditional)
            for text in prompts
        ]
        rows = [Row(one, tiny_tokenizer(), (), prompt=(0, 1)) for one in requests]
        with undisturbed(model), torch.no_grad():
            decoder = Decoder(adapter, 0, **{"form": "rolling", **options})
            for row in rows:
                run(decoder, [row])
            decoder.close()
        assert [row.chosen for row in rows] == expected, options
    assert len(prefixes) > 0
    assert rows[0].cached_tokens == 0
    assert adapter.kept.applied == []


def test_probabilities_of_a_prompt_are_of_the_text_as_it_was_decided() -> None:
    model = build("llama")
    for text, steering in ((MET[0], steers(vector(), model)), (UNMET[0], ())):
        rows = []
        for edits in (steers(vector().when(condition_of(model, 1)), model), steering):
            ids = list(tiny_tokenizer()(text).input_ids)
            request = TextRequest(ids, max_tokens=2, steering=edits, logprobs=1, prompt_logprobs=True)
            rows.append(Row(request, tiny_tokenizer(), ()))
            decode(adapter_for(model), rows[-1:], 0)
        assert rows[0].prompt_logprobs == rows[1].prompt_logprobs
        assert len(rows[0].prompt_logprobs) == len(rows[0].ids)


def test_every_way_to_generate_decides_alike(tmp_path: Path) -> None:
    model, tokenizer = build("llama"), tiny_tokenizer()
    path = tmp_path / "conditional.safetensors"
    vector().when(condition_of(model, 1)).save(path)
    conditional = SteeringVector.load(path)
    options: dict[str, Any] = {"sampling_method": "top-k", "seed": 3, "max_tokens": N}
    for text, steered in ((MET[0], True), (UNMET[0], False)):
        expected = generate(model, tokenizer, text, vector=vector() if steered else None, **options)
        assert generate(model, tokenizer, text, vector=conditional, **options) == expected
        assert "".join(stream(model, tokenizer, text, vector=conditional, **options)) == expected
        assert generate_batch(model, tokenizer, [text], vector=conditional, **options) == [expected]


def test_a_condition_of_another_model_is_refused() -> None:
    model = build("llama")
    with pytest.raises(ValidationError, match="wide"):
        wide = PromptCondition(1, torch.ones(7), 0.0)
        plan = steers(vector(), model)
        written(model, MET, (Steer(plan[0].layer, plan[0].edit, condition=wide),))
    with pytest.raises(ValidationError, match="layer"):
        written(model, MET, steers(vector().when(PromptCondition(9, torch.ones(D_MODEL), 0.0)), model))
    with pytest.raises(ValidationError, match="direction"):
        PromptCondition(1, torch.zeros(D_MODEL), 0.0)


# On a model that can write: texts about Paris are calmed, texts about Rome are left alone.


def prompts_about(split: str) -> tuple[list[str], list[str]]:
    pairs = read_pairs(dataset_path("paris_rome"), split=split)
    return tuple(  # type: ignore[return-value]
        [prompt + answer for prompt, answer in zip(pairs.prompts, answers, strict=True)]
        for answers in (pairs.positive_answers, pairs.negative_answers)
    )


def test_a_fitted_condition_keeps_the_effect_and_leaves_other_texts_alone() -> None:
    loaded = load("mx-tiny", backend="transformers")
    own, others = prompts_about("train")
    condition = fit_condition(loaded.model, own, others, tokenizer=loaded.tokenizer, false_positives=0.02)
    assert condition.false_positives is not None and condition.false_positives <= 0.02
    tone = read_pairs(dataset_path("calm_angry"), split="train")
    calm = caa_vectors(
        loaded.model, tone.prompts, tone.positive_answers, tone.negative_answers, None, loaded.tokenizer
    )
    kept_own, kept_others = prompts_about("heldout")
    prompts = [*kept_own, *kept_others]
    options: dict[str, Any] = {"sampling_method": "greedy", "max_tokens": 12, "strength": 4.0}
    conditional, always, plain = (
        generate_batch(loaded.model, loaded.tokenizer, prompts, vector=one, **options)
        for one in (calm.when(condition), calm, None)
    )
    n = len(kept_own)
    steered = sum(a == b for a, b in zip(conditional[:n], always[:n], strict=True)) / n
    left = sum(a == b for a, b in zip(conditional[n:], plain[n:], strict=True)) / len(kept_others)
    changed = sum(a != b for a, b in zip(always, plain, strict=True)) / len(prompts)
    assert changed > 0.9
    assert steered >= 0.95
    assert left >= 0.98


# On SmolLM2: questions about cooking are steered, whatever else is asked is left alone.

DISHES = ("rice", "lentils", "chicken", "carrots", "pasta", "salmon", "eggs", "beans", "pumpkin", "pancakes")
COOKING = ("How do I cook {}?", "What goes well with {}?", "Give me a recipe with {}.", "Is {} healthy food?")
TOPICS = (
    "photosynthesis",
    "gravity",
    "inflation",
    "chess",
    "the French Revolution",
    "black holes",
    "vaccines",
)
OTHERWISE = ("Explain {} to me.", "Why is {} important?", "Where can I read about {}?")
UNSEEN_DISHES = (
    "lamb",
    "mushrooms",
    "spinach",
    "cheese",
    "tofu",
    "apples",
    "onions",
    "shrimp",
    "noodles",
    "soup",
)
UNSEEN_COOKING = (
    "Tell me how to prepare {} for dinner.",
    "Which spices suit {}?",
    "What can I make out of {}?",
)
UNSEEN_TOPICS = (
    *(
        "the brain",
        "the tides",
        "a bank",
        "volcanoes",
        "poetry",
        "football",
        "bees",
        "mirrors",
        "the moon",
        "taxes",
    ),
    *("cameras", "bridges", "dinosaurs", "sleep", "music", "electricity", "trains"),
)
UNSEEN_OTHERWISE = ("What do you know about {}?", "Write a short note on {}.", "How would you describe {}?")
FOOD = ("cook", "eat", "bread", "kitchen", "boils")


def asked(templates: tuple[str, ...], about: tuple[str, ...]) -> list[Any]:
    return [[{"role": "user", "content": one.format(it)}] for one in templates for it in about]


@pytest.mark.real
def test_on_a_real_model_the_effect_is_kept_and_other_chats_stay_as_they_are(loaded: Any) -> None:
    model, tokenizer = loaded.model, loaded.tokenizer
    general = [
        [{"role": "user", "content": question}]
        for question in open_questions()
        if not any(word in question for word in FOOD)
    ]
    own, others = asked(COOKING, DISHES), [*asked(OTHERWISE, TOPICS), *general]
    condition = fit_condition(model, own, others, tokenizer=tokenizer, false_positives=0.02)
    questions = [[{"role": "user", "content": question}] for question in open_questions()[:16]]
    pirate, plain = (
        [f"{begin} That is a good question." for _ in questions]
        for begin in ("Arrr, matey! Ye be askin' the captain.", "Thank you for asking.")
    )
    vector = caa_vectors(model, questions, pirate, plain, [14], tokenizer)
    conditional = vector.when(condition)
    options: dict[str, Any] = {"sampling_method": "greedy", "max_tokens": 16, "strength": 1.5}

    def written(chats: list[Any], steered: SteeringVector | None) -> list[str]:
        return generate_batch(model, tokenizer, chats, vector=steered, **options)

    cooking, rest = asked(UNSEEN_COOKING, UNSEEN_DISHES), asked(UNSEEN_OTHERWISE, UNSEEN_TOPICS)
    always, kept = written(cooking, vector), written(cooking, conditional)
    left, untouched = written(rest, conditional), written(rest, None)
    kept_share = sum(a == b for a, b in zip(always, kept, strict=True)) / len(cooking)
    left_share = sum(a == b for a, b in zip(left, untouched, strict=True)) / len(rest)
    print(
        f"layer {condition.layer}: kept {kept_share:.3f} of {len(cooking)}, left {left_share:.3f} of {len(rest)}"
    )
    assert kept_share >= 0.95
    assert left_share >= 0.98


def test_too_few_prompts_and_rates_that_are_none_are_refused() -> None:
    model = build("llama")
    with pytest.raises(ValidationError, match="8 prompts"):
        fit_condition(model, list(MET), list(UNMET), tokenizer=tiny_tokenizer())
    own, others = prompts_about("train")
    with pytest.raises(ValidationError, match="false_positives"):
        fit_condition(model, own, others, tokenizer=tiny_tokenizer(), false_positives=0)
    with pytest.raises(ValidationError, match="the same"):
        fit_condition(model, own, own, tokenizer=tiny_tokenizer())


def test_a_gate_of_tokens_and_a_condition_go_together() -> None:
    model = build("llama")
    gated = vector().when(TokenGate.above(vector()[EDITED], 0.2))
    conditional = gated.when(condition_of(model, 1))
    expected = [
        written(model, (MET[0],), steers(gated, model))[0],
        written(model, (UNMET[0],), ())[0],
    ]
    assert written(model, (MET[0], UNMET[0]), steers(conditional, model)) == expected
