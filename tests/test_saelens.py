"""What is read computes what SAELens computes, and the other way round; scripts/check_saelens.sh gets SAELens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sae_files
import torch
from sae_files import D_IN, draw
from test_sae_formats import ARCHITECTURES
from torch import Tensor

from mechanex.engine.sae import saelens
from mechanex.engine.sae.read import read_sae

sae_lens = pytest.importorskip("sae_lens")
loaders = pytest.importorskip("sae_lens.loading.pretrained_sae_loaders")

X = draw(50, D_IN, seed=98)
CLOSE = 1e-5


def assert_same(ours: Any, theirs: Any, x: Tensor = X) -> None:
    with torch.no_grad():
        pairs = [(ours.encode(x), theirs.encode(x)), (ours.reconstruct(x), theirs(x))]
    for found, wanted in pairs:
        assert found.shape == wanted.shape
        far = float((found - wanted).abs().max() / wanted.abs().max().clamp_min(1))
        print(f"{theirs.cfg.architecture():26s} {far:.2e}")
        assert far < CLOSE


def loaded(folder: Path, **options: Any) -> Any:
    return sae_lens.SAE.load_from_disk(folder, device="cpu", **options)


SETTINGS: list[dict[str, Any]] = [
    {},
    {"normalize_activations": "layer_norm"},
    {"normalize_activations": "constant_norm_rescale"},
    {"normalize_activations": "expected_average_only_in"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_their_folders(architecture: str, settings: dict[str, Any], tmp_path: Path) -> None:
    sae_files.write_saelens(tmp_path, architecture, **settings)
    theirs = loaded(tmp_path)
    assert_same(read_sae(tmp_path), theirs)
    assert_same(read_sae(theirs), theirs)


@pytest.mark.parametrize("architecture", ["topk", "abstopk"])
def test_top_k_by_the_decoders_norms(architecture: str, tmp_path: Path) -> None:
    sae_files.write_saelens(
        tmp_path, architecture, rescale_acts_by_decoder_norm=True, apply_b_dec_to_input=False
    )
    assert_same(read_sae(tmp_path), loaded(tmp_path))


def test_heads(tmp_path: Path) -> None:
    metadata = {"sae_lens_version": "6.54.0", "hook_name": "blocks.3.attn.hook_z"}
    sae_files.write_saelens(tmp_path, "standard", reshape_activations="hook_z", metadata=metadata)
    assert_same(read_sae(tmp_path), loaded(tmp_path), X.view(50, 3, 4))


def test_folders_of_before_6(tmp_path: Path) -> None:
    sae_files.write_old_saelens(tmp_path / "relu")
    assert_same(read_sae(tmp_path / "relu"), loaded(tmp_path / "relu"))
    sae_files.write_old_saelens(
        tmp_path / "topk",
        activation_fn_str="topk",
        activation_fn_kwargs={"k": 4},
        normalize_activations="layer_norm",
    )
    assert_same(read_sae(tmp_path / "topk"), loaded(tmp_path / "topk"))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_they_read_what_is_written(architecture: str, tmp_path: Path) -> None:
    sae_files.write_saelens(tmp_path / "theirs", architecture, normalize_activations="layer_norm")
    ours = read_sae(tmp_path / "theirs")
    saelens.write(ours, tmp_path / "ours")
    theirs = loaded(tmp_path / "ours")
    assert_same(ours, theirs)
    assert theirs.cfg.metadata.hook_name == (
        "blocks.3.hook_mlp_in" if ours.is_transcoder else "blocks.4.hook_resid_pre"
    )


def test_what_batch_top_k_training_saves(tmp_path: Path) -> None:
    config = sae_lens.BatchTopKTrainingSAEConfig(d_in=D_IN, d_sae=40, k=5, device="cpu")
    training = sae_lens.BatchTopKTrainingSAE(config)
    training.topk_threshold.fill_(0.4)
    training.save_inference_model(tmp_path)
    assert_same(read_sae(tmp_path), loaded(tmp_path))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Their loaders find the Hub's files under this folder."""
    from safetensors import safe_open

    def download(repo_id: str, filename: str, subfolder: str | None = None, **_: Any) -> str:
        return str(tmp_path / repo_id / (subfolder or "") / filename)

    def shapes(repo_id: str, filename: str) -> dict[str, list[int]]:
        with safe_open(tmp_path / repo_id / filename, "pt") as file:
            return {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118

    monkeypatch.setattr(loaders, "hf_hub_download", download)
    monkeypatch.setattr(loaders, "get_safetensors_tensor_shapes", shapes)
    return tmp_path


def by(
    loader: Callable[..., Any], repo: str, folder: str, factor: float | None = None, **overrides: Any
) -> Any:
    """What their loader makes of a folder of the Hub."""
    config, state, *_ = loader(repo, folder, "cpu", False, {"dtype": "float32", **overrides})
    config = loaders.handle_config_defaulting(config)
    kind = sae_lens.SAE.get_sae_config_class_for_architecture(config["architecture"])
    made = kind.from_dict(config)
    theirs = sae_lens.SAE.get_sae_class_for_architecture(made.architecture())(made)
    theirs.process_state_dict_for_loading(state)
    theirs.load_state_dict(state)
    if factor is not None:
        theirs.fold_activation_norm_scaling_factor(factor)
    return theirs


def test_gemma_scope(hub: Path) -> None:
    repo, folder = "google/gemma-scope-2b-pt-res", "layer_20/width_16k/average_l0_71"
    sae_files.write_gemma_scope(hub / repo / folder)
    theirs = by(loaders.gemma_2_sae_huggingface_loader, repo, folder, d_in=D_IN, d_sae=40)
    assert_same(read_sae(hub / repo / folder), theirs)
    folder = "embedding/width_4k/average_l0_6"
    sae_files.write_gemma_scope(hub / repo / folder)
    theirs = by(loaders.gemma_2_sae_huggingface_loader, repo, folder, d_in=D_IN, d_sae=40)
    assert_same(read_sae(hub / repo / folder), theirs)


@pytest.mark.parametrize(("folder", "transcoder"), [("resid_post", False), ("transcoder", True)])
def test_gemma_scope_2(folder: str, transcoder: bool, hub: Path) -> None:
    repo, place = "google/gemma-scope-2-1b-it", f"{folder}/layer_13_width_16k_l0_medium"
    sae_files.write_gemma_scope_2(hub / repo / place, transcoder=transcoder)
    assert_same(read_sae(hub / repo / place), by(loaders.gemma_3_sae_huggingface_loader, repo, place))


def test_llama_scope(hub: Path) -> None:
    repo, folder = "fnlp/Llama3_1-8B-Base-LXR-8x", "Llama3_1-8B-Base-L20R-8x"
    sae_files.write_llama_scope(hub / repo / folder, norm=1.7)
    theirs = by(loaders.llama_scope_sae_huggingface_loader, repo, folder, D_IN**0.5 / 1.7)
    assert_same(read_sae(hub / repo / folder), theirs)


def test_sparsify(hub: Path) -> None:
    """In the case in which theirs follows sparsify: linear, not normalised decoders, and features without signs."""
    repo, folder = "EleutherAI/sae-pythia", "layers.5"
    sae_files.write_sparsify(hub / repo / folder, linear=True)
    assert_same(read_sae(hub / repo / folder), by(loaders.sparsify_huggingface_loader, repo, folder))


@pytest.mark.parametrize(
    "name", ["AutoEncoder", "AutoEncoderTopK", "BatchTopKSAE", "JumpReluAutoEncoder", "GatedAutoEncoder"]
)
def test_dictionary_learning(name: str, hub: Path) -> None:
    repo, folder = "canrager/lm_sae", "trainer_3"
    sae_files.write_dictionary_learning(hub / repo / folder, name)
    theirs = by(loaders.dictionary_learning_sae_huggingface_loader_1, repo, folder)
    assert_same(read_sae(hub / repo / folder), theirs)
