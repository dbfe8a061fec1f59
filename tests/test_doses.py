"""Doses: forced answers under many settings at once, calibrated strengths, and vectors that carry their dose."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from families import N_LAYERS, build, tiny_tokenizer

from mechanex import Mechanex, SteeringVector, ValidationError
from mechanex.bundled import data_path
from mechanex.engine.caa import caa_vectors
from mechanex.engine.datasets import read_pairs
from mechanex.engine.divergence import divergence
from mechanex.engine.doses.calibrate import PASSES, calibrate, dose_quantile, plain_pairs
from mechanex.engine.doses.dose import EDITS, Dose, kind_of
from mechanex.engine.doses.forced import ForcedAnswers
from mechanex.engine.generate import generate
from mechanex.engine.hooks import Intervention, SteeringPlan
from mechanex.engine.intervention import Edit
from mechanex.engine.models import adapter_for
from mechanex.engine.models.resolve import LoadedModel, load
from mechanex.engine.text import encode_pair
from mechanex.engine.vectors import SteeringVector as Vector

TEXTS = [
    ("The old man said", " good"),
    ("The old man said", " nothing at all"),
    ("She looked at", " the river"),
]


@pytest.fixture(scope="module")
def tiny() -> LoadedModel:
    return load("mx-tiny", backend="transformers")


@pytest.fixture(scope="module")
def calm(tiny: LoadedModel) -> Vector:
    pairs = read_pairs(data_path("calm_angry"), split="train")
    examples = (pairs.prompts[:40], pairs.positive_answers[:40], pairs.negative_answers[:40])
    return caa_vectors(tiny.model, *examples, [3], tiny.tokenizer)


def alone(model: Any, prompt: list[int], answer: list[int], plan: SteeringPlan | None) -> torch.Tensor:
    """[n_tokens, vocabulary] log-probabilities that predict an answer, by a call of the model on it alone."""
    ids = torch.tensor([[*prompt, *answer]])
    with torch.no_grad():
        if plan is None:
            logits = model(ids).logits
        else:
            with plan.apply(model):
                logits = model(ids).logits
    found: torch.Tensor = logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
    return found


@pytest.mark.parametrize("family", ["llama", "gemma2", "bloom"])
def test_settings_in_one_batch_are_what_each_is_alone(family: str) -> None:
    model, tokenizer = build(family), tiny_tokenizer()
    adapter = adapter_for(model)
    torch.manual_seed(0)
    vector = Vector({layer: torch.randn(adapter.d_model) for layer in range(N_LAYERS + 1)})
    pairs = [encode_pair(tokenizer, *text) for text in TEXTS]
    doses = [
        Dose(layer, strength, edit, tokens)
        for layer, strength, edit, tokens in [
            (0, 1.0, "add", "all"),
            (N_LAYERS, 0.5, "add", "generated"),
            (1, 2.0, "clamp", "all"),
            (2, 1.0, "norm", "prompt"),
            (1, -1.0, "add", "prompt"),
        ]
    ]
    chosen = {"all": None, "generated": slice(-1, None), "prompt": slice(0, -1)}
    found = ForcedAnswers(adapter, pairs).under([dose.of(vector) for dose in doses])
    for dose, one in zip(doses, found, strict=True):
        direction = vector[dose.layer] * dose.strength
        edit = {"add": Edit.add(direction), "clamp": Edit.clamp(direction, 1.0)}.get(dose.edit)
        edit = edit or Edit.add(direction).gated("norm")
        kls, logprobs = [], []
        for prompt, answer in pairs:
            mask = torch.zeros(1, len(prompt) + len(answer), dtype=torch.bool)
            where = chosen[dose.tokens] or slice(None)
            places = torch.arange(mask.shape[1])
            start, stop, _ = where.indices(len(prompt))
            mask[0] = (places >= start) & ((places < stop) if where.stop is not None else True)
            after = alone(model, prompt, answer, SteeringPlan([Intervention(dose.layer, edit, mask=mask)]))
            before = alone(model, prompt, answer, None)
            kls.append((after.exp() * (after - before)).sum(-1))
            logprobs.append(after.gather(1, torch.tensor(answer)[:, None])[:, 0])
        torch.testing.assert_close(one.kl.double(), torch.cat(kls), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(one.logprobs.double(), torch.cat(logprobs), rtol=1e-4, atol=1e-4)


def test_what_steers_nothing_costs_nothing(tiny: LoadedModel, calm: Vector) -> None:
    pairs = [encode_pair(tiny.tokenizer, "Anna went to the market.", " She bought bread.")]
    (found,) = ForcedAnswers(adapter_for(tiny.model), pairs).under([Dose(3, 0.0).of(calm)])
    assert found.kl.abs().max() < 1e-6


@pytest.mark.parametrize("kl", [0.3, 2.0])
def test_calibration_finds_what_bisection_finds(
    tiny: LoadedModel, calm: Vector, kl: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = adapter_for(tiny.model)
    held = read_pairs(data_path("calm_angry"), split="heldout").prompts[:16]
    forced = ForcedAnswers(adapter, plain_pairs(adapter, tiny.tokenizer, held, None, 24, 0))
    low, high, evaluated = 0.0, 8.0, 0
    while high / max(low, 1e-3) > 1.02:
        middle = (low + high) / 2
        (found,) = forced.under([Dose(3, middle).of(calm)])
        evaluated += 1
        low, high = (middle, high) if dose_quantile(found.kl) < kl else (low, middle)
    counted: list[int] = []
    under = ForcedAnswers.under

    def counting(self: ForcedAnswers, settings: Any) -> Any:
        counted.append(len(settings))
        return under(self, settings)

    monkeypatch.setattr(ForcedAnswers, "under", counting)
    record = calibrate(tiny.model, calm, kl, prompts=held, max_tokens=24).calibration
    assert record is not None and record.kl == kl
    assert abs(record.strength / low - 1) < 0.05
    assert abs(dict(record.seen)[record.strength] / kl - 1) < 0.05
    assert len(counted) <= PASSES
    assert sum(counted) <= evaluated + 4


def test_a_calibrated_vector_says_what_was_seen_beyond(
    tiny: LoadedModel, calm: Vector, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = calibrate(tiny.model, calm, 1.0, prompts=["Anna went home.", "Tom saw a dog."], max_tokens=16)
    assert found == calm and calm.calibration is None
    found.save(tmp_path / "v.safetensors")
    again = Vector.load(tmp_path / "v.safetensors")
    assert again.calibration == found.calibration
    strength = again.calibration.strength
    assert (2 * again).calibration.strength == pytest.approx(strength / 2)
    assert (-again).calibration.strength == pytest.approx(-strength)
    assert again.normalized().calibration is None and (again + again).calibration is None
    with caplog.at_level(logging.WARNING):
        again.plan(tiny.model, strength)
        assert not caplog.records
        again.plan(tiny.model, 100.0)
    assert "nats" in caplog.text and "100" in caplog.text


@pytest.mark.parametrize("given", [None, 3, "vector", [1.0]])
def test_what_cannot_be_calibrated_is_named(tiny: LoadedModel, given: object) -> None:
    with pytest.raises(ValidationError, match=r"needs \{layer: tensor\}"):
        calibrate(tiny.model, given, tokenizer=tiny.tokenizer)  # type: ignore[arg-type]


def test_a_budget_that_no_strength_meets_is_an_error(tiny: LoadedModel, calm: Vector) -> None:
    clamped = Dose(3, 1.0, "clamp").vector(calm)
    with pytest.raises(ValidationError, match="no strength was found"):
        calibrate(tiny.model, clamped, 1e-4, prompts=["Anna went home."], max_tokens=12)
    with pytest.raises(ValidationError, match="above 0"):
        calibrate(tiny.model, calm, 0.0)
    with pytest.raises(ValidationError, match="zero"):
        calibrate(tiny.model, calm * 0, 1.0)


def test_a_vector_with_its_dose_inside_steers_by_it(tiny: LoadedModel, calm: Vector, tmp_path: Path) -> None:
    dosed = Dose(3, 0.7, "clamp", "generated").vector(calm)
    dosed.save(tmp_path / "dosed.safetensors")
    dosed = Vector.load(tmp_path / "dosed.safetensors")
    assert (kind_of(dosed), dosed.tokens) == ("clamp", "generated")
    prompt, options = "Anna met the neighbour.", {"sampling_method": "greedy", "max_tokens": 12}
    found = generate(tiny.model, tiny.tokenizer, prompt, vector=dosed, strength=1.0, **options)
    plan = SteeringPlan([Intervention(3, Edit.clamp(calm[3], 0.7), tokens=slice(-1, None))])
    ids = tiny.tokenizer(prompt, return_tensors="pt")
    with plan.apply(tiny.model), torch.no_grad():
        theirs = tiny.model.generate(**ids, max_new_tokens=12, do_sample=False)
    assert found == tiny.tokenizer.decode(theirs[0], skip_special_tokens=True)
    with pytest.raises(ValidationError, match="don't add up"):
        dosed + calm
    with pytest.raises(ValidationError, match="safetensors"):
        dosed.save(tmp_path / "dosed.json")
    with pytest.raises(ValidationError, match="tokens to steer"):
        calm.on_tokens("some")


@pytest.mark.parametrize("edit", EDITS)
def test_strength_one_of_a_doses_vector_does_what_the_dose_does(
    tiny: LoadedModel, calm: Vector, edit: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    plane = calm.rotating({3: torch.randn(calm.width)}, 0.0)
    dose = Dose(3, 0.4, edit, "generated")
    made = dose.vector(plane)
    made.save(tmp_path / "v.safetensors")
    made = Vector.load(tmp_path / "v.safetensors")
    hidden = torch.randn(5, calm.width)
    ((theirs,), (ours,)) = made.plan(tiny.model).interventions, dose.of(plane)
    torch.testing.assert_close(theirs.edit.apply(hidden), ours.edit.apply(hidden), rtol=1e-5, atol=1e-5)
    assert theirs.tokens == ours.tokens == slice(-1, None) and theirs.layer == 3
    assert kind_of(made) == edit


def test_a_dose_of_a_rotation_turns_by_the_angle_of_the_addition(calm: Vector) -> None:
    mean = torch.randn(calm.width, generator=torch.Generator().manual_seed(1))
    ((one,),) = [Dose(3, 1.0, "rotate").of(calm.rotating({3: mean}, 0.0))]
    turned = one.edit.apply(mean[None])[0].double()
    direction, along = calm[3].double(), mean.double() / mean.double().norm()
    added = mean.double() + direction - (direction @ along) * along
    assert torch.cosine_similarity(turned, added, 0) == pytest.approx(1.0, abs=1e-5)
    with pytest.raises(ValidationError, match="second direction"):
        Dose(3, 1.0, "rotate").of(calm)


def test_calibrate_is_a_door_of_the_client(calm: Vector) -> None:
    client = Mechanex()
    client.load("mx-tiny")
    found = client.steering.calibrate(dict(calm), 0.5, prompts=["Anna went home."], max_tokens=12)
    assert isinstance(found, SteeringVector) and math.isfinite(found.calibration.strength)


def test_tokens_that_a_model_rules_out_count_nothing() -> None:
    logits = torch.randn(2, 3, 7, dtype=torch.float64)
    ruled_out = logits.clone()
    ruled_out[..., 2] = -math.inf
    p, q = ruled_out.log_softmax(-1)
    left = [0, 1, 3, 4, 5, 6]
    truth = (p.exp() * (p - q))[..., left].sum(-1)
    assert torch.allclose(divergence(p, q), truth)
    assert torch.isinf(divergence(logits[0].log_softmax(-1), q)).all()  # what only the other one rules out
    steered = ruled_out[0].requires_grad_()
    divergence(q, steered.log_softmax(-1)).sum().backward()
    assert steered.grad is not None and torch.isfinite(steered.grad).all()
