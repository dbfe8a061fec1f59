"""Answers that are watched: scored token by token, corrected or ended where a behavior shows, else left alone."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mechanex.bundled import data_path, tone_words
from mechanex.engine.datasets import read_pairs
from mechanex.engine.generate import generate_batch
from mechanex.engine.hooks import attach
from mechanex.engine.models import adapter_for
from mechanex.engine.models.adapter import ModelAdapter
from mechanex.engine.models.resolve import load
from mechanex.engine.sae.autoencoder import SparseAutoencoder
from mechanex.engine.sae.behavior import Behavior
from mechanex.engine.sae.corrections import WAYS, Correction
from mechanex.engine.sae.create import create
from mechanex.engine.sae.detectors import FeatureDetector, ProbeDetector
from mechanex.engine.sae.generate import _Watching, generate_watched
from mechanex.engine.sae.hook_points import HookPoint
from mechanex.engine.sae.registry import default_sae
from mechanex.engine.sae.scoring import Scorer
from mechanex.engine.score import completion_logprobs
from mechanex.errors import ValidationError

TRAIN = read_pairs(data_path("calm_angry"), split="train")
HELD = read_pairs(data_path("calm_angry"), split="heldout")
WORDS = {tone: set(words) for tone, words in tone_words().items()}


def opened(answers: list[str], n: int) -> list[str]:
    """Held-out prompts with the first words of an answer, which the model goes on from in its tone."""
    prompts = [str(prompt) for prompt in HELD.prompts]
    return [
        prompt + " ".join(answer.split(" ")[:5]) for prompt, answer in zip(prompts, answers, strict=True)
    ][:n]


PROVOKING, CALM = opened(HELD.negative_answers, 24), opened(HELD.positive_answers, 24)
NEUTRAL = [str(prompt) for prompt in HELD.prompts][:24]
GREEDY: dict[str, Any] = {"sampling_method": "greedy", "max_tokens": 28}


def is_angry(text: str) -> bool:
    """Whether most of a text's words of a tone are angry, by the list that the corpus was made from."""
    words = "".join(c if c.isalpha() else " " for c in text.lower()).split()
    counts = {tone: sum(word in known for word in words) for tone, known in WORDS.items()}
    return counts["angry"] > max(n for tone, n in counts.items() if tone != "angry")


def share(prompts: list[str], texts: list[Any]) -> float:
    return sum(is_angry(t.text[len(p) :]) for p, t in zip(prompts, texts, strict=True)) / len(texts)


@pytest.fixture(scope="module")
def tiny() -> ModelAdapter:
    loaded = load("mx-tiny", backend="transformers")
    adapter = adapter_for(loaded.model)
    adapter.tokenizer = loaded.tokenizer
    return adapter


@pytest.fixture(scope="module")
def anger(tiny: ModelAdapter) -> Behavior:
    examples = TRAIN.prompts[:40], TRAIN.negative_answers[:40], TRAIN.positive_answers[:40]
    return create(tiny, "anger", *examples, sae=default_sae("mx-tiny"), source="mx-tiny")


def perplexity(adapter: ModelAdapter, prompts: list[str], texts: list[Any]) -> float:
    pairs = [(p, t.text[len(p) :]) for p, t in zip(prompts, texts, strict=True) if len(t.text) > len(p)]
    found = completion_logprobs(adapter, [p for p, _ in pairs], [c for _, c in pairs])
    return math.exp(-float(found.sums.sum()) / sum(len(one) for one in found.tokens))


def test_anger_is_corrected_and_calm_is_left_alone(tiny: ModelAdapter, anger: Behavior) -> None:
    plain = generate_watched(tiny, None, PROVOKING, [anger], action="report", **GREEDY)
    corrected = generate_watched(tiny, None, PROVOKING, [anger], **GREEDY)
    assert share(PROVOKING, plain) > 0.5
    assert share(PROVOKING, corrected) <= share(PROVOKING, plain) / 4
    drawn = {"sampling_method": "top-k", "seed": 3, "max_tokens": 28}
    usual = generate_watched(tiny, None, PROVOKING, [anger], action="report", **drawn)
    better = generate_watched(tiny, None, PROVOKING, [anger], **drawn)
    usual_price, price = perplexity(tiny, PROVOKING, usual), perplexity(tiny, PROVOKING, better)
    assert price <= 1.5 * usual_price
    same = 0
    for prompts in (CALM, NEUTRAL):
        ours = generate_watched(tiny, None, prompts, [anger], **GREEDY)
        theirs = generate_batch(tiny, None, prompts, **GREEDY)
        same += sum(a.text == b for a, b in zip(ours, theirs, strict=True))
    assert same >= 0.98 * (len(CALM) + len(NEUTRAL))


def test_reports_leave_the_text_alone_and_tell_every_token(tiny: ModelAdapter, anger: Behavior) -> None:
    found = generate_watched(tiny, None, PROVOKING[:6], [anger], action="report", **GREEDY)
    assert [one.text for one in found] == generate_batch(tiny, None, PROVOKING[:6], **GREEDY)
    for prompt, one in zip(PROVOKING, found, strict=False):
        ids = tiny.tokenizer(prompt)["input_ids"]
        chosen = [t.token for t in one.trace]
        seen: list[Tensor] = []
        with (
            attach(tiny, [(anger.point.layer, lambda h, into=seen: into.append(h[0].float()))]),
            torch.no_grad(),
        ):  # type: ignore[misc]
            tiny.hf_model(torch.tensor([ids + chosen]))
        wanted = anger.scores(seen[0])[len(ids) : len(ids) + len(chosen) - 1]
        told = torch.tensor([t.scores["anger"] for t in one.trace[:-1]])
        torch.testing.assert_close(told, wanted, rtol=1e-3, atol=1e-3)
        assert one.trace[-1].scores == {} and not any(t.corrected for t in one.trace)
        assert [bool(t.detected) for t in one.trace[:-1]] == (told > anger.threshold).tolist()
        assert ("anger" in one.detected) == any(t.detected for t in one.trace)
        assert "".join(t.text for t in one.trace).strip().startswith(one.text[len(prompt) :].strip()[:20])


def test_corrections_begin_with_the_token_that_shows_it(tiny: ModelAdapter, anger: Behavior) -> None:
    for one in generate_watched(tiny, None, PROVOKING[:8], [anger], **GREEDY):
        first = next((i for i, t in enumerate(one.trace) if t.detected), None)
        corrected = [bool(t.corrected) for t in one.trace[:-1]]
        assert corrected == [first is not None and i >= first for i in range(len(corrected))]


def test_an_answer_is_ended_by_the_token_that_shows_it(tiny: ModelAdapter, anger: Behavior) -> None:
    found = generate_watched(tiny, None, [*PROVOKING[:6], *CALM[:3]], [anger], action="abort", **GREEDY)
    ended = [one for one in found if one.finish_reason == "behavior"]
    assert len(ended) >= 4 and all(one.finish_reason != "behavior" for one in found[6:])
    for one in ended:
        assert [bool(t.detected) for t in one.trace] == [False] * (len(one.trace) - 1) + [True]
    whole = generate_watched(tiny, None, PROVOKING[:6], [anger], action="report", **GREEDY)
    for short, long in zip(found, whole, strict=False):
        assert long.text.startswith(short.text)


def test_rows_are_watched_each_its_own_way_as_alone(tiny: ModelAdapter, anger: Behavior) -> None:
    together = generate_watched(tiny, None, PROVOKING[:5], [anger], **GREEDY)
    for prompt, one in zip(PROVOKING, together, strict=False):
        (alone,) = generate_watched(tiny, None, [prompt], [anger], **GREEDY)
        assert alone.text == one.text and len(alone.trace) == len(one.trace)
        for a, b in zip(alone.trace, one.trace, strict=True):
            assert a.scores == pytest.approx(b.scores, abs=1e-3)
    from mechanex.engine.sampling import Options

    call = _Watching(tiny, None, PROVOKING[:3], Options(**GREEDY), [anger], "correct", ())
    call.watches[1].behaviors = ()
    mixed = call.watched()
    plain = generate_batch(tiny, None, PROVOKING[:3], **GREEDY)
    assert [one.text for one in mixed] == [together[0].text, plain[1], together[2].text]
    assert mixed[1].detected == () and all(t.scores == {} for t in mixed[1].trace)


def test_forced_steering_is_there_from_the_start(tiny: ModelAdapter, anger: Behavior) -> None:
    plain = generate_watched(tiny, None, PROVOKING, [anger], action="report", **GREEDY)
    forced = generate_watched(tiny, None, PROVOKING, [], forced=[anger], **GREEDY)
    assert share(PROVOKING, forced) <= share(PROVOKING, plain) / 2
    assert all(one.detected == () for one in forced)


def test_nothing_stays_on_the_model(tiny: ModelAdapter, anger: Behavior) -> None:
    def hooks() -> int:
        return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in tiny.hf_model.modules())

    before = hooks()
    generate_watched(tiny, None, PROVOKING[:2], [anger], **GREEDY)
    assert hooks() == before
    broken = replace(anger, correction=replace(anger.correction, way="cap", direction=torch.zeros(5)))
    with pytest.raises(RuntimeError):
        generate_watched(tiny, None, PROVOKING[:6], [broken], **GREEDY)
    assert hooks() == before


def test_behaviors_of_other_models_are_refused(tiny: ModelAdapter, anger: Behavior) -> None:
    other = replace(anger, family="gpt2", model="gpt2")
    with pytest.raises(
        ValidationError, match=r"was made for gpt2, a model of the family 'gpt2', and mx-tiny is of"
    ):
        generate_watched(tiny, None, NEUTRAL[:1], [other])
    wide = replace(anger, width=64)
    with pytest.raises(ValidationError, match=r"64 wide, and mx-tiny has 6 layers of width 128"):
        generate_watched(tiny, None, NEUTRAL[:1], [wide])
    high = replace(anger, point=HookPoint("resid", 7))
    with pytest.raises(ValidationError, match=r"is read at resid.7 of mx-tiny"):
        generate_watched(tiny, None, NEUTRAL[:1], [], forced=[high])
    with pytest.raises(ValidationError, match=r"action is correct, abort or report; got 'stop'"):
        generate_watched(tiny, None, NEUTRAL[:1], [anger], action="stop")  # type: ignore[arg-type]


def random_behaviors(n: int, each: int, sae: SparseAutoencoder) -> list[Behavior]:
    generator = torch.Generator().manual_seed(1)
    found = []
    for i in range(n):
        places = torch.randperm(sae.n_features, generator=generator)[:each]
        weights = torch.randn(each, generator=generator)
        features = FeatureDetector(sae, places, weights, 0.1 * i, 1.0 + i, torch.zeros(each))
        direction = torch.nn.functional.normalize(torch.randn(sae.d_in, generator=generator), dim=0)
        probe = ProbeDetector(direction, -1.0, 2.0 + i)
        correction = Correction("cap", direction, -1.0, 2.0)
        kind: Any = "probe" if i % 7 == 3 else "features"
        kept = features if sae.k is not None or i % 2 else features.narrowed()
        point = HookPoint("resid", 1)
        facts = (f"b{i}", "", "m", None, sae.d_in, point, kind, probe, kept, None, 0.5, correction)
        found.append(Behavior(*facts))
    return found


KINDS = ["jumprelu", "gated", "topk"]


def random_autoencoder(kind: str, generator: torch.Generator) -> SparseAutoencoder:
    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return SparseAutoencoder(
        draw(600, 48) / 48**0.5,
        draw(600) / 3,
        draw(600, 48),
        draw(48) / 3,
        activation=kind,  # type: ignore[arg-type]
        threshold=draw(600).abs() if kind == "jumprelu" else None,
        gain=draw(600) / 3 if kind == "gated" else None,
        offset=draw(600) / 3 if kind == "gated" else None,
        k=20 if kind == "topk" else None,
        subtract_decoder_bias=True,
        normalization="layer_norm",
    )


@pytest.mark.parametrize("kind", KINDS)
def test_many_behaviors_at_once_score_as_each_alone(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    sae = random_autoencoder(kind, generator)
    behaviors = random_behaviors(32, 16, sae)
    x = torch.randn(9, 48, generator=generator)
    wanted = torch.stack([b.scores(x) for b in behaviors], 1)
    whole = sae.encode(x)
    for i, behavior in enumerate(behaviors):
        if behavior.detector == "features" and behavior.features is not None:
            said = whole[:, behavior.features.names] @ behavior.features.weights
            torch.testing.assert_close((said - 0.1 * i) / (1 + 0.9 * i), wanted[:, i], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(Scorer(behaviors)(x), wanted, rtol=1e-4, atol=1e-4)
    near = Scorer(behaviors, dtype=torch.bfloat16)(x)
    assert float((near - wanted).abs().median()) < 0.02


@pytest.mark.parametrize("kind", KINDS)
def test_scores_and_corrections_have_shapes_that_no_value_decides(kind: str) -> None:
    behaviors = random_behaviors(8, 16, random_autoencoder(kind, torch.Generator().manual_seed(0)))
    scorer = Scorer(behaviors)
    # Fake tensors have no values, and raise where one is asked for.
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(5, 48)
        assert scorer(x).shape == (5, 8)
        for way in WAYS:
            features = next(b.features for b in behaviors if b.features is not None)
            made = replace(behaviors[0].correction, way=way, detector=features)
            assert made(x).shape == x.shape


def test_columns_of_an_autoencoder_in_bfloat16_are_kept_so_and_scores_stay(anger: Behavior) -> None:
    found = anger.features
    assert found is not None and found.sae.encoder.shape[1] == 128
    part = replace(found.sae, encoder=found.sae.encoder.bfloat16().float(), activation="relu", k=None)
    half = replace(anger, detector="features", features=replace(found, sae=part).narrowed())
    x = torch.randn(7, 128, generator=torch.Generator().manual_seed(0))
    scorer = Scorer([half])
    assert scorer._parts[0]._encoder.dtype == torch.bfloat16
    torch.testing.assert_close(scorer(x)[:, 0], half.scores(x), rtol=1e-5, atol=1e-5)
    whole = replace(half, features=replace(found, sae=replace(part, encoder=found.sae.encoder)).narrowed())
    assert Scorer([whole])._parts[0]._encoder.dtype == torch.float32


def test_places_of_one_answer_are_told_token_by_token(tiny: ModelAdapter, anger: Behavior) -> None:
    other = replace(anger, name="other", point=HookPoint("resid", 3), detector="probe", threshold=1e9)
    (both,) = generate_watched(tiny, None, PROVOKING[:1], [anger, other], **GREEDY)
    (one,) = generate_watched(tiny, None, PROVOKING[:1], [anger], **GREEDY)
    assert both.text == one.text and len(both.trace) == len(one.trace)
    assert all(set(t.scores) == {"anger", "other"} for t in both.trace[:-1])
    assert [t.corrected for t in both.trace] == [t.corrected for t in one.trace]


@pytest.mark.parametrize("how", ["reread", "static"])
def test_answers_are_watched_however_the_model_takes_its_calls(
    tiny: ModelAdapter, anger: Behavior, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = PROVOKING[:1] if how == "reread" else PROVOKING[:4]
    for action in ("correct", "abort"):
        wanted = generate_watched(tiny, None, prompts, [anger], action=action, **GREEDY)
        with monkeypatch.context() as patch:
            patch.setattr("mechanex.engine.decode.run.form", lambda *_: how)
            found = generate_watched(tiny, None, prompts, [anger], action=action, **GREEDY)
        for a, b in zip(found, wanted, strict=True):
            assert (a.text, a.finish_reason, a.detected) == (b.text, b.finish_reason, b.detected)
            assert [t.corrected for t in a.trace] == [t.corrected for t in b.trace]
            for one, other in zip(a.trace, b.trace, strict=True):
                assert one.scores == pytest.approx(other.scores, abs=1e-3)
    assert any(t.corrected for one in wanted for t in one.trace) or action == "abort"


def test_steering_and_watching_at_one_layer_is_seen_steered(
    tiny: ModelAdapter, anger: Behavior, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = []
    for how in ("rolling", "static"):
        monkeypatch.setattr("mechanex.engine.decode.run.form", lambda *_, how=how: how)
        found = generate_watched(
            tiny, None, PROVOKING[:2], [anger], action="report", forced=[anger], **GREEDY
        )
        told.append([[t.scores.get("anger", 0.0) for t in one.trace] for one in found])
    for rolling, static in zip(*told, strict=True):
        assert rolling == pytest.approx(static, abs=1e-3)
