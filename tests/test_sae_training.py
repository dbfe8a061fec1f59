"""Training sparse autoencoders: what comes of it, what it is worth, and that a stopped run goes on exactly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mechanex.bundled import data_path
from mechanex.engine.models import adapter_for
from mechanex.engine.models.adapter import ModelAdapter
from mechanex.engine.models.resolve import load
from mechanex.engine.sae.activations import Rounds, as_pairs
from mechanex.engine.sae.autoencoder import SparseAutoencoder
from mechanex.engine.sae.hook_points import HookPoint
from mechanex.engine.sae.quality import measured
from mechanex.engine.sae.read import read_sae
from mechanex.engine.sae.train import Trained, train_sae
from mechanex.engine.sae.train_step import TrainedWeights, TrainingSettings, step
from mechanex.errors import ValidationError

TEXTS = [
    json.loads(line)["prompt"] + json.loads(line)[side]
    for line in data_path("calm_angry").read_text().splitlines()
    for side in ("positive", "negative")
][:80]
SMALL: dict[str, Any] = {"n_features": 64, "k": 8, "batch": 128, "buffer": 512, "context": 48}


@pytest.fixture(scope="module")
def tiny() -> ModelAdapter:
    loaded = load("mx-tiny", backend="transformers")
    adapter = adapter_for(loaded.model)
    adapter.tokenizer = loaded.tokenizer
    return adapter


def run(tiny: ModelAdapter, rule: str = "topk", **options: Any) -> Trained:
    settings = TrainingSettings(rule, **SMALL, steps=options.pop("steps", 12))  # type: ignore[arg-type]
    return train_sae(tiny, TEXTS, settings=settings, **options)


def identity(width: int, point: HookPoint) -> SparseAutoencoder:
    """An autoencoder that loses nothing: a feature for each direction and each sign of it."""
    eye = torch.eye(width)
    both = torch.cat([eye, -eye])
    return SparseAutoencoder(both, torch.zeros(2 * width), both, torch.zeros(width), point=point)


def test_a_short_training_explains_most_and_is_read_back(tiny: ModelAdapter, tmp_path: Path) -> None:
    trained = run(tiny, steps=150, out=tmp_path / "sae")
    report = trained.report
    assert report["variance_explained"] > 0.5 and report["l0"] <= 8 and report["loss_recovered"] > 0.7
    assert report["loss_zeroed"] > report["loss_spliced"] > report["loss"] > 0
    assert report["steps"] == 150 and report["activations"] == 150 * 128
    back = read_sae(tmp_path / "sae")
    assert back.point == trained.sae.point == HookPoint("resid", 4)
    assert back.model == "mx-tiny" and back.architecture == "topk"
    x = torch.randn(5, 128)
    assert torch.equal(back.reconstruct(x), trained.sae.reconstruct(x))
    assert json.loads((tmp_path / "sae" / "report.json").read_text()) == report


@pytest.mark.parametrize("rule", ["topk", "batchtopk", "jumprelu"])
def test_a_stopped_run_goes_on_exactly(rule: str, tiny: ModelAdapter, tmp_path: Path) -> None:
    stop = {"topk": 4, "batchtopk": 6, "jumprelu": 1}[rule]  # at a round's end, in the second, in the first
    whole = run(tiny, rule, batch_tokens=512)
    path = tmp_path / "run.ckpt"
    first = run(tiny, rule, checkpoint=path, callback=lambda n, _: n == stop, batch_tokens=512)
    assert first.report["steps"] == stop and path.exists()
    seen: list[int] = []
    again = run(tiny, rule, checkpoint=path, callback=lambda n, _: seen.append(n), batch_tokens=512)
    assert seen == list(range(stop + 1, 13)) and not path.exists()
    for name in ("encoder", "bias", "decoder", "decoder_bias", "threshold"):
        ours, theirs = getattr(again.sae, name), getattr(whole.sae, name)
        assert (ours is None and theirs is None) or torch.equal(ours, theirs), name


def test_another_runs_checkpoint_is_refused(tiny: ModelAdapter, tmp_path: Path) -> None:
    path = tmp_path / "run.ckpt"
    run(tiny, checkpoint=path, callback=lambda n, _: n == 2)
    with pytest.raises(ValidationError, match=r"is the checkpoint of another run: .* Give the same ones"):
        run(tiny, steps=13, checkpoint=path)
    weight = tiny.layers[0].mlp.down_proj.weight  # type: ignore[union-attr]
    before = weight.detach().clone()
    with torch.no_grad():
        weight.mul_(-3)
    try:
        with pytest.raises(ValidationError, match=r"the activations are not those that .* was made from"):
            run(tiny, checkpoint=path)
    finally:
        with torch.no_grad():
            weight.copy_(before)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValidationError, match=r"is not a readable checkpoint"):
        run(tiny, checkpoint=path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValidationError, match=r"is not a checkpoint of an autoencoder"):
        run(tiny, checkpoint=path)


def test_batch_top_k_ends_with_the_threshold_that_keeps_k_a_token(tiny: ModelAdapter) -> None:
    trained = run(tiny, "batchtopk", steps=100)
    sae = trained.sae
    assert (
        sae.activation == "jumprelu" and sae.threshold is not None and len(set(sae.threshold.tolist())) == 1
    )
    assert trained.report["l0"] == pytest.approx(8, rel=0.15)


def test_jumprelu_comes_near_the_wanted_number_of_features(tiny: ModelAdapter) -> None:
    settings = TrainingSettings("jumprelu", **SMALL, steps=250, lr=5e-3)
    trained = train_sae(tiny, TEXTS, settings=settings)
    assert 5 < trained.report["l0"] < 13 and trained.report["variance_explained"] > 0.4
    assert trained.sae.threshold is not None and bool((trained.sae.threshold >= 0).all())


def test_features_that_say_nothing_are_revived() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 16, generator=generator) * 4
    settings = TrainingSettings("topk", n_features=40, k=4, steps=400, batch=512, buffer=512, dead_after=1024)
    weights = TrainedWeights.begin(settings, torch.zeros(16))
    weights.parameters["bias"][:20] = -100.0
    weights.silent[:20] = 10_000
    dead = [step(weights, x, float(x.square().sum(1).mean()), settings)["dead"] for _ in range(300)]
    assert dead[0] >= 20
    # Biases of -100 can't be unlearned in so few steps: what counts is that they move.
    assert float(weights.parameters["bias"][:20].min()) == -100.0
    weights.parameters["bias"][:20] = -8.0
    dead = [step(weights, x, float(x.square().sum(1).mean()), settings)["dead"] for _ in range(100)]
    assert dead[-1] < 5


@pytest.mark.parametrize("point", ["resid.4", "resid.6", "mlp_out.2", "attn_out.3"])
def test_what_loses_nothing_recovers_all(point: str, tiny: ModelAdapter) -> None:
    from mechanex.engine.sae.hook_points import hook_point

    pairs = as_pairs(tiny.tokenizer, TEXTS[:20], 64)
    found = measured(tiny, identity(tiny.d_model, hook_point(point)), pairs)
    assert found["variance_explained"] == pytest.approx(1)
    assert found["loss_spliced"] == pytest.approx(found["loss"], abs=1e-5)
    assert found["loss_zeroed"] > found["loss"] + 0.01
    assert found["loss_recovered"] == pytest.approx(1, abs=1e-3)
    assert found["l0"] == pytest.approx(tiny.d_model)


def test_the_first_token_of_a_text_is_left_out(tiny: ModelAdapter) -> None:
    pairs = as_pairs(tiny.tokenizer, TEXTS[:4], 64)
    data, following = Rounds(tiny, pairs, HookPoint("resid", 0), sum(len(b) for _, b in pairs), 0).at(0)
    x = data.x
    embedded = tiny.hf_model.get_input_embeddings().weight.detach()  # type: ignore[operator]
    assert following == 4
    known = {tuple(row) for row in embedded.tolist()}
    assert all(tuple(row) in known for row in x.tolist())
    first = {tuple(embedded[a[0]].tolist()) for a, _ in pairs}
    assert not first & {tuple(row) for row in x.tolist()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rule": "l1"}, "rule is topk, batchtopk or jumprelu; got 'l1'"),
        ({"k": 65}, "k is at most the number of features, 64; got 65"),
        ({"steps": 0}, "steps is a whole number from 1 up; got 0"),
        ({"buffer": 1000}, "buffer is a multiple of batch, 128"),
        ({"lr": float("inf")}, "lr is a finite number above 0; got inf"),
        ({"seed": -1}, "seed is a whole number from 0 up"),
    ],
)
def test_settings_are_checked(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TrainingSettings(**{**SMALL, **change})


def test_what_can_not_be_trained_on_is_refused(tiny: ModelAdapter) -> None:
    with pytest.raises(ValidationError, match=r"no text has two tokens"):
        train_sae(tiny, ["", ""])
    with pytest.raises(ValidationError, match=r"needs at least two texts"):
        train_sae(tiny, ["One text of some tokens."])
    with pytest.raises(
        ValidationError, match=r"resid.7 is not there: mx-tiny has 6 blocks, so that the last"
    ):
        train_sae(tiny, TEXTS, point="resid.7")


def test_the_bundled_autoencoder_is_what_its_card_says(tiny: ModelAdapter) -> None:
    from mechanex.bundled import sae_path
    from mechanex.engine.sae.registry import default_sae

    folder = sae_path("mx-tiny")
    card = json.loads((folder / "report.json").read_text())
    assert card["variance_explained"] >= 0.85 and card["loss_recovered"] >= 0.9
    assert sum(path.stat().st_size for path in folder.iterdir()) < 1_500_000
    sae = default_sae("mx-tiny")
    assert (sae.n_features, sae.d_in, sae.activation) == (1024, 128, "topk")
    found = measured(tiny, sae, as_pairs(tiny.tokenizer, TEXTS, 128))
    assert found["variance_explained"] > 0.9 and found["loss_recovered"] > 0.98
