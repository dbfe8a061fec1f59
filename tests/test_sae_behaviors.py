"""Behaviors: what tells them, how sure that is, what is kept of them, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import sae_files
import torch

from mechanex.bundled import data_path
from mechanex.engine.datasets import read_pairs
from mechanex.engine.models import adapter_for
from mechanex.engine.models.adapter import ModelAdapter
from mechanex.engine.models.resolve import load
from mechanex.engine.sae.autoencoder import SparseAutoencoder
from mechanex.engine.sae.behavior import Behavior
from mechanex.engine.sae.calibration import calibrated, per_answer, share, widened
from mechanex.engine.sae.corrections import Correction
from mechanex.engine.sae.create import create
from mechanex.engine.sae.detectors import FeatureDetector, auroc, fit_features, fit_probe
from mechanex.engine.sae.explain import explain
from mechanex.engine.sae.hook_points import HookPoint
from mechanex.engine.sae.read import read_sae
from mechanex.engine.sae.registry import default_sae
from mechanex.engine.sae.store import BehaviorStore
from mechanex.engine.vectors import SteeringVector
from mechanex.errors import NotFoundError, ValidationError

TRAIN = read_pairs(data_path("calm_angry"), split="train")
HELD = read_pairs(data_path("calm_angry"), split="heldout")
# The data's positive side is calm; the behavior is anger.
EXAMPLES = (TRAIN.prompts[:24], TRAIN.negative_answers[:24], TRAIN.positive_answers[:24])


@pytest.fixture(scope="module")
def tiny() -> ModelAdapter:
    loaded = load("mx-tiny", backend="transformers")
    adapter = adapter_for(loaded.model)
    adapter.tokenizer = loaded.tokenizer
    return adapter


@pytest.fixture(scope="module")
def anger(tiny: ModelAdapter) -> Behavior:
    return create(tiny, "anger", *EXAMPLES, sae=default_sae("mx-tiny"), source="mx-tiny")


def test_anger_is_told_from_calm(tiny: ModelAdapter, anger: Behavior) -> None:
    for kind in ("features", "probe"):
        figures = anger.figures[f"{kind}_figures"]
        assert figures["auroc"] > 0.97
        low, high = figures["auroc_interval"]
        assert low < figures["auroc"] <= high <= 1
    assert anger.point == HookPoint("resid", 4) and anger.model == "mx-tiny"
    assert anger.features is not None and 1 <= len(anger.features.names) <= 16
    assert {one["way"] for one in anger.figures["corrections"]} == {"cap", "subtract", "clamp", "features"}
    best = max(one["effect"] for one in anger.figures["corrections"])
    assert best > 0.1


def test_examples_that_made_no_part_of_it_are_told_too(tiny: ModelAdapter, anger: Behavior) -> None:
    from mechanex.engine.sae.examples import read_examples

    held = read_examples(
        tiny, anger.point, HELD.prompts[:40], HELD.negative_answers[:40], HELD.positive_answers[:40]
    )
    for detector in (anger.probe, anger.features):
        assert detector is not None
        means = [float(one.mean()) for one in held.by_answer(detector.scores(held.x))]
        assert auroc(means[:40], means[40:])[0] > 0.97
    found = held.by_answer(anger.scores(held.x))
    assert sum(bool((one > anger.threshold).any()) for one in found[40:]) <= 2
    assert sum(bool((one > anger.threshold).any()) for one in found[:40]) >= 20


def test_behaviors_survive_the_process(anger: Behavior, mechanex_home: Path) -> None:
    store = BehaviorStore()
    assert store.names() == []
    store.put(anger)
    back = BehaviorStore().get("anger")
    assert back.as_dict() == anger.as_dict()
    x = torch.randn(7, 128)
    assert torch.equal(back.scores(x), anger.scores(x))
    assert torch.equal(back.correction(x), anger.correction(x))
    assert (mechanex_home / "behaviors" / "anger.safetensors").stat().st_size < 100_000
    store.delete("anger")
    assert store.names() == []
    with pytest.raises(NotFoundError, match=r"no behavior is called 'anger'; there is: none"):
        store.get("anger")


def test_a_damaged_file_is_refused(anger: Behavior, mechanex_home: Path) -> None:
    store = BehaviorStore()
    store.put(anger)
    path = mechanex_home / "behaviors" / "anger.safetensors"
    whole = path.read_bytes()
    for broken in (whole[:100], whole[:-4], whole[:-40] + b"\x01" + whole[-39:], b""):
        path.write_bytes(broken)
        with pytest.raises(ValidationError, match=r"anger.safetensors is not a sound behavior file"):
            store.get("anger")


@pytest.mark.parametrize("name", ["", " x", "a/b", "../x", "x" * 65, 3, ".x"])
def test_names_that_could_be_paths_are_refused(name: object) -> None:
    with pytest.raises(ValidationError, match=r"a behavior's name has up to 64 letters"):
        BehaviorStore().get(name)  # type: ignore[arg-type]


def test_a_given_vector_is_the_direction(tiny: ModelAdapter) -> None:
    vector = SteeringVector({4: torch.randn(128), 2: torch.randn(128)})
    made = create(tiny, "anger", *EXAMPLES, vector=vector, steering_vector_id="some", correction="subtract")
    along = made.correction.direction @ vector[4] / vector[4].norm()
    assert abs(float(along)) == pytest.approx(1, abs=1e-5)
    assert made.correction.way == "subtract" and made.steering_vector_id == "some"
    assert made.detector == "probe" and made.features is None
    with pytest.raises(
        ValidationError, match=r"the vector has layers \[2\] and the behavior is read at layer 4"
    ):
        create(tiny, "anger", *EXAMPLES, vector=vector.restricted([2]))


def test_examples_that_do_not_separate_say_so(tiny: ModelAdapter) -> None:
    sides = list(zip(TRAIN.negative_answers[:16], TRAIN.positive_answers[:16], strict=True))
    answers, others = zip(*(pair[:: (-1) ** i] for i, pair in enumerate(sides)), strict=True)
    with pytest.raises(ValidationError, match=r"the examples don't separate: .* Nothing is kept"):
        create(tiny, "noise", TRAIN.prompts[:16], answers, others)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": TRAIN.prompts[:3]}, r"must be of one length; got 3, 24 and 24"),
        ({"positive_answers": ["", *EXAMPLES[1][1:]]}, r"has no tokens"),
        ({"false_alarms": 1.0}, r"false_alarms is a rate per answer of 64 tokens, between 0 and 1"),
        ({"detector": "best"}, r"detector is auto, features or probe"),
        ({"detector": "features"}, r"features are those of an autoencoder, and there is none"),
    ],
)
def test_arguments_are_checked(change: dict[str, Any], message: str, tiny: ModelAdapter) -> None:
    given = dict(zip(("prompts", "positive_answers", "negative_answers"), EXAMPLES, strict=True)) | change
    with pytest.raises(ValidationError, match=message):
        create(tiny, "anger", **given)


def test_an_autoencoder_that_does_not_fit_is_refused(tiny: ModelAdapter, tmp_path: Path) -> None:
    sae_files.write_saelens(tmp_path / "a", "standard")
    with pytest.raises(ValidationError, match=r"width 12 and those of mx-tiny at resid.4 are 128 wide"):
        create(tiny, "anger", *EXAMPLES, sae=read_sae(tmp_path / "a"))
    sae_files.write_gemma_scope(tmp_path / "b")
    with pytest.raises(ValidationError, match=r"it isn't known where this autoencoder reads"):
        create(tiny, "anger", *EXAMPLES, sae=read_sae(tmp_path / "b"))
    few = [x[:3] for x in EXAMPLES]
    with pytest.raises(ValidationError, match=r"needs at least 4 examples.*got 3"):
        create(tiny, "anger", *few)


def test_features_are_shown_with_their_contexts(tiny: ModelAdapter, anger: Behavior) -> None:
    texts = [p + a for p, a in zip(HELD.prompts, HELD.negative_answers, strict=True)][:30]
    found = explain(tiny, anger, [str(text) for text in texts], features=3, contexts=4)
    assert len(found) == 3
    for one in found:
        values = [context.value for context in one.contexts]
        assert values == sorted(values, reverse=True) and len(values) <= 4
        assert all(any(c.token.strip() in str(text) for text in texts) for c in one.contexts)


def gated(width: int = 12) -> SparseAutoencoder:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return SparseAutoencoder(
        draw(30, width),
        draw(30) / 3,
        draw(30, width),
        draw(width),
        activation="gated",
        gain=draw(30) / 3,
        offset=draw(30) / 3,
        subtract_decoder_bias=True,
        architecture="gated",
        point=HookPoint("resid", 1),
    )


@pytest.mark.parametrize("kind", ["relu", "jumprelu", "gated", "topk", "topk-norms", "abstopk"])
def test_a_detector_asks_exactly_what_the_whole_autoencoder_says(kind: str) -> None:
    from dataclasses import replace

    sae = gated()
    if kind != "gated":
        activation: Any = kind.split("-")[0]
        sae = replace(
            sae,
            activation=activation,
            gain=None,
            offset=None,
            threshold=sae.bias.abs() if kind == "jumprelu" else None,
            k=6 if "topk" in kind else None,
            by_decoder_norm=kind == "topk-norms",
            normalization="layer_norm",
        )
    x = torch.randn(40, 12)
    features = torch.tensor([3, 7, 29])
    found = FeatureDetector(sae, features, torch.ones(3), 0.0, 1.0, torch.zeros(3))
    torch.testing.assert_close(found.values(x), sae.encode(x)[:, features])
    torch.testing.assert_close(found.narrowed().values(x), sae.encode(x)[:, features])
    assert found.narrowed().names == [3, 7, 29]
    # Correcting by features changes x as decode of the clamped ones does, where the error cancels.
    levels = torch.full((3,), 0.1)
    correction = Correction(
        "features",
        torch.zeros(12),
        0,
        1,
        detector=FeatureDetector(sae, features, torch.ones(3), 0, 1, levels),
    )
    whole = sae.encode(x)
    clamped = whole.clone()
    clamped[:, features] = torch.minimum(whole[:, features], levels)
    prepared = sae.prepare(x)
    wanted = x + sae.decode(clamped, prepared) - sae.decode(whole, prepared)
    torch.testing.assert_close(correction(x), wanted, rtol=1e-4, atol=1e-4)


def test_corrections_by_a_direction() -> None:
    v = torch.nn.functional.normalize(torch.randn(8), dim=0)
    x = torch.randn(50, 8) * 3
    along = x @ v
    for way, wanted in (
        ("cap", along.clamp(max=-1.0)),
        ("clamp", torch.full((50,), -1.0)),
        ("subtract", along - 3.0),
    ):
        out = Correction(way, v, -1.0, 2.0)(x)  # type: ignore[arg-type]
        torch.testing.assert_close(out @ v, wanted)
        torch.testing.assert_close(out - (out @ v)[:, None] * v, x - along[:, None] * v)
    torch.testing.assert_close(Correction("cap", v, -1.0, 2.0, 2.0)(x) @ v, along.clamp(max=-4.0))
    half = x.bfloat16()
    assert Correction("cap", v, -1.0, 2.0)(half).dtype == torch.bfloat16


def test_a_feature_that_tells_is_found() -> None:
    sae = SparseAutoencoder(torch.eye(6), torch.zeros(6), torch.eye(6), torch.zeros(6))
    x = torch.rand(400, 6)
    answer = torch.arange(400) // 10
    positive = torch.arange(40) < 20
    x[positive[answer], 2] += 1
    found = fit_features(sae, x, answer, positive, most=1)
    assert found is not None and found.names == [2] and float(found.weights[0]) > 0
    scores = found.scores(x)
    assert float(scores[positive[answer]].mean()) == pytest.approx(1)
    assert float(scores[~positive[answer]].mean()) == pytest.approx(0, abs=1e-5)
    probe = fit_probe(x, answer, positive)
    assert float(probe.direction[2]) > 0.95
    same = torch.ones(400, 6)
    assert fit_features(sae, same, answer, positive) is None
    with pytest.raises(ValidationError, match=r"have the same activations"):
        fit_probe(same, answer, positive)


def test_auroc_counts_pairs() -> None:
    area, low, high = auroc([1, 2, 3, 3], [0, 1, 3, 2])
    pairs = [(p, n) for p in (1, 2, 3, 3) for n in (0, 1, 3, 2)]
    assert area == pytest.approx(sum(1.0 if p > n else 0.5 * (p == n) for p, n in pairs) / 16)
    assert low < area < high
    assert auroc([5.0] * 6, [1.0] * 6)[1] < 1  # six pairs don't make sure


def test_thresholds_keep_the_promised_rate() -> None:
    generator = torch.Generator().manual_seed(3)
    alarms = []
    for _ in range(40):
        scores = torch.randn(1500, generator=generator)
        threshold = calibrated(scores, 0.01)
        fresh = torch.randn(2000, 64, generator=generator)
        alarms.append(float((fresh > threshold).any(1).float().mean()))
    # A Gaussian's tail is thinner than the exponential that continues it: alarms are rarer than promised.
    assert sum(alarms) / len(alarms) < 0.01
    many = torch.randn(200_000, generator=generator)
    fresh = torch.randn(4000, 64, generator=generator)
    found = float((fresh > calibrated(many, 0.05)).any(1).float().mean())
    assert found == pytest.approx(0.05, abs=0.015)


def test_thresholds_are_as_high_as_what_is_to_be_found_allows() -> None:
    found = [torch.tensor([0.0, high]) for high in torch.linspace(2, 3, 21).tolist()]
    assert widened(1.0, found) == pytest.approx((1.0 + 2.05) / 2)
    assert widened(2.5, found) == 2.5


def test_rates_have_intervals() -> None:
    found = per_answer([torch.zeros(32), torch.tensor([0.0, 5.0]), torch.zeros(30)], 1.0)
    assert (found.count, found.of) == (1, 1.0) and found.low < found.rate < found.high
    none = per_answer([torch.zeros(640)], 1.0)
    assert none.rate == 0 and none.low == 0 and none.high == pytest.approx(0.37, abs=0.2)
    hits = share([True] * 9 + [False])
    assert hits.rate == 0.9 and 0.5 < hits.low < 0.9 < hits.high < 1
    assert math.isclose(share([True] * 20).high, 1.0)
