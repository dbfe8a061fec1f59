"""A guard: no token is chosen from a distribution that steering moved further than it allows, by whole passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import D_MODEL, build, n_hooks, tiny_tokenizer
from test_conditions import MET, UNMET, condition_of

from mechanex import SteeringVector, ValidationError
from mechanex.bundled import dataset_path
from mechanex.engine.caa import caa_vectors
from mechanex.engine.conditions.guarding import GuardedText, generate_guarded
from mechanex.engine.datasets import read_pairs
from mechanex.engine.decode.guarded import SHARES
from mechanex.engine.generate import generate, generate_batch, stream
from mechanex.engine.hooks import Intervention, SteeringPlan
from mechanex.engine.intervention import Edit
from mechanex.engine.models.resolve import load

PROMPTS = (*MET, *UNMET)
LAYER = 2
GREEDY: dict[str, Any] = {"sampling_method": "greedy", "max_tokens": 8}


def vector(strength: float = 1.0) -> SteeringVector:
    direction = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(5))
    return SteeringVector({LAYER: direction * strength})


def logits(model: Any, ids: list[int], edits: list[tuple[Edit, int]] = ()) -> torch.Tensor:  # type: ignore[assignment]
    """[tokens, vocabulary] of a whole pass without a cache, its tokens edited each by itself."""
    plan = SteeringPlan(Intervention(LAYER, edit, tokens=at) for edit, at in edits)
    with torch.no_grad(), plan.apply(model):
        found: torch.Tensor = model(input_ids=torch.tensor([ids])).logits[0]
    return found.float()


def recomputed(model: Any, one: GuardedText, edit: Edit) -> list[list[float]]:
    """KL(steered‖plain) of each chosen token at every share, by whole passes over the text that was written."""
    ids, n = [*one.prompt_ids, *one.tokens], len(one.prompt_ids)
    plain = logits(model, ids)
    found = []
    for i in range(len(one.tokens)):
        last = n - 1 + i
        past = [(edit, at) for at in range(n - 1)]
        past += [(edit.scaled(one.trace[j].share), n - 1 + j) for j in range(i)]
        kls = []
        for share in SHARES:
            steered = logits(model, ids[: last + 1], [*past, (edit.scaled(share), last)])[-1]
            p, q = steered.log_softmax(-1), plain[last].log_softmax(-1)
            kls.append(float((p.exp() * (p - q)).sum()))
        found.append(kls)
    return found


def check(model: Any, one: GuardedText, edit: Edit, guard: float, tolerance: float = 2e-3) -> None:
    """The trace is what whole passes give, the share the strongest within the bound, and no token is above it."""
    for told, kls in zip(one.trace, recomputed(model, one, edit), strict=True):
        assert told.full_kl == pytest.approx(kls[0], abs=tolerance, rel=tolerance)
        chosen = SHARES.index(told.share)
        if told.plain:
            assert told.kl == 0 and min(kls) > guard - tolerance
        else:
            assert told.kl <= guard and kls[chosen] <= guard + tolerance
            assert told.kl == pytest.approx(kls[chosen], abs=tolerance, rel=tolerance)
            assert all(kl > guard - tolerance for kl in kls[:chosen])


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "gemma2", "phi"])
def test_every_token_is_chosen_at_the_strongest_share_within_the_bound(family: str) -> None:
    model = build(family)
    steered = vector(0.7)
    ((_, direction),) = steered.items()
    options: dict[str, Any] = {**GREEDY, "max_tokens": 5, "vector": steered}
    whole = generate_guarded(model, tiny_tokenizer(), PROMPTS[1:3], guard=1e6, **options)
    seen = sorted(token.full_kl for one in whole for token in one.trace)
    guard = seen[len(seen) // 3]
    found = generate_guarded(model, tiny_tokenizer(), PROMPTS[1:3], guard=guard, **options)
    shares = {token.share for one in found for token in one.trace}
    assert 1.0 in shares and len(shares) > 1
    for one in found:
        check(model, one, Edit.add(direction), guard)
    assert n_hooks(model) == 0


def test_a_guard_that_never_binds_changes_nothing_and_one_of_zero_steers_nothing() -> None:
    model, tokenizer = build("llama"), tiny_tokenizer()
    for options in (GREEDY, {"max_tokens": 8, "seed": 3}):
        steered, plain = (
            generate_batch(model, tokenizer, list(PROMPTS), vector=one, **options) for one in (vector(), None)
        )
        assert steered != plain
        for guard, expected in ((1e6, steered), (0.0, plain)):
            texts = generate_batch(model, tokenizer, list(PROMPTS), vector=vector(), guard=guard, **options)
            assert texts == expected


def test_rows_are_what_they_are_alone_and_streams_give_the_same() -> None:
    model, tokenizer = build("llama"), tiny_tokenizer()
    options: dict[str, Any] = {**GREEDY, "vector": vector(), "guard": 1.0}
    together = generate_batch(model, tokenizer, list(PROMPTS), **options)
    assert together == [generate(model, tokenizer, text, **options) for text in PROMPTS]
    assert together == ["".join(stream(model, tokenizer, text, **options)) for text in PROMPTS]
    stop = together[0][len(PROMPTS[0]) :][3:6]
    short = generate_guarded(model, tokenizer, PROMPTS, **{**options, "stop": stop})
    assert len({len(one.tokens) for one in short}) > 1  # rows that end leave the others alone
    for one, whole in zip(short, together, strict=True):
        assert whole.startswith(one.text)


def test_a_guard_goes_with_conditions_and_schedules() -> None:
    model, tokenizer = build("llama"), tiny_tokenizer()
    conditional = vector().when(condition_of(model, 1)).scheduled([1.0, 0.5], prompt=1.0)
    always = vector().scheduled([1.0, 0.5], prompt=1.0)
    options: dict[str, Any] = {**GREEDY, "guard": 1.0}
    found = generate_batch(model, tokenizer, [MET[0], UNMET[0]], vector=conditional, **options)
    assert found[0] == generate(model, tokenizer, MET[0], vector=always, **options)
    assert found[1] == generate(model, tokenizer, UNMET[0], **GREEDY)
    loose = generate_batch(model, tokenizer, [MET[0]], vector=always, **{**options, "guard": 1e6})
    assert loose == [generate(model, tokenizer, MET[0], vector=always, **GREEDY)]


@pytest.mark.parametrize("family", ["bloom", "mamba"])
def test_a_model_in_which_strengths_can_not_be_tried_is_refused(family: str) -> None:
    with pytest.raises(ValidationError, match="can't be guarded"):
        generate(build(family), tiny_tokenizer(), MET[0], vector=vector(), guard=1.0, **GREEDY)


def test_what_is_no_guard_is_refused() -> None:
    model, tokenizer = build("llama"), tiny_tokenizer()
    for guard in (-1.0, float("nan"), "2"):
        with pytest.raises(ValidationError, match="guard"):
            generate(model, tokenizer, MET[0], vector=vector(), guard=guard, **GREEDY)
    with pytest.raises(ValidationError, match="vector"):
        generate_guarded(model, tokenizer, PROMPTS, guard=1.0, **GREEDY)
    with pytest.raises(ValidationError, match="two tokens"):
        generate(model, tokenizer, [5], vector=vector(), guard=1.0, **GREEDY)


def guarded_texts(
    n_prompts: int, n_tokens: int, guard: float, seed: int = 0
) -> tuple[Any, Edit, list[GuardedText]]:
    loaded = load("mx-tiny", backend="transformers")
    tone = read_pairs(dataset_path("calm_angry"), split="train")
    angry = -1 * caa_vectors(
        loaded.model, tone.prompts, tone.positive_answers, tone.negative_answers, [LAYER], loaded.tokenizer
    )
    edit = Edit.add(angry[LAYER] * 3.0)
    found = generate_guarded(
        loaded.model,
        loaded.tokenizer,
        tone.prompts[:n_prompts],
        guard=guard,
        vector=angry,
        strength=3.0,
        max_tokens=n_tokens,
        seed=seed,
    )
    return loaded.model, edit, found


def above(model: Any, one: GuardedText, edit: Edit, guard: float) -> int:
    """How many tokens come from a distribution above the bound, by one plain and one steered pass over the text."""
    ids, n = [*one.prompt_ids, *one.tokens], len(one.prompt_ids)
    edits = [(edit, at) for at in range(n - 1)]
    edits += [(edit.scaled(token.share), n - 1 + j) for j, token in enumerate(one.trace)]
    p, q = logits(model, ids, edits).log_softmax(-1), logits(model, ids).log_softmax(-1)
    kls = (p.exp() * (p - q)).sum(-1)[n - 1 : -1]
    plain = torch.tensor([token.plain for token in one.trace])
    return int(((kls > guard + 1e-3) & ~plain).sum())


def test_no_token_is_above_the_bound() -> None:
    model, edit, found = guarded_texts(8, 24, 0.5)
    assert sum(one.held_back for one in found) > 10
    assert sum(above(model, one, edit, 0.5) for one in found) == 0


@pytest.mark.ci
@pytest.mark.long
def test_no_token_of_ten_thousand_is_above_the_bound() -> None:
    total = held_back = 0
    for seed in (0, 1000, 2000):
        model, edit, found = guarded_texts(96, 80, 2.0, seed)
        total += sum(len(one.tokens) for one in found)
        held_back += sum(one.held_back for one in found)
        assert sum(above(model, one, edit, 2.0) for one in found) == 0
    assert total > 10_000 and held_back > 100
