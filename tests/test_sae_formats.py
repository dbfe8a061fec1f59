"""Sparse autoencoders of other libraries' files compute what those libraries say; unsound files are refused."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import numpy
import pytest
import sae_files
import torch
from sae_files import D_IN, D_OUT, D_SAE, K, draw
from safetensors.torch import save_file
from torch import Tensor

from mechanex.engine.sae import registry, saelens
from mechanex.engine.sae.hook_points import HookPoint, hook_point
from mechanex.engine.sae.read import read_sae
from mechanex.errors import NotFoundError, ValidationError

X = draw(7, D_IN, seed=99)


def top(z: Tensor, k: int, signed: bool) -> Tensor:
    """The k largest of every row, written out."""
    out = torch.zeros_like(z)
    for row, kept in zip(z, out, strict=True):
        order = sorted(range(len(row)), key=lambda i: -abs(float(row[i])) if signed else -float(row[i]))
        for i in order[:k]:
            kept[i] = row[i] if signed else max(float(row[i]), 0.0)
    return out


def assert_close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted.float(), rtol=1e-5, atol=1e-5)


ARCHITECTURES = (
    "standard",
    "gated",
    "topk",
    "abstopk",
    "jumprelu",
    "transcoder",
    "skip_transcoder",
    "jumprelu_transcoder",
    "jumprelu_skip_transcoder",
)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_architectures_of_saelens(architecture: str, tmp_path: Path) -> None:
    w = {n: t.double() for n, t in sae_files.write_saelens(tmp_path, architecture).items()}
    sae = read_sae(tmp_path)
    x = X.double()
    inside = x if "transcoder" in architecture else x - w["b_dec"]
    if architecture == "gated":
        gate = inside @ w["W_enc"] + w["b_gate"] > 0
        features = gate * (inside @ (w["W_enc"] * w["r_mag"].exp()) + w["b_mag"]).relu()
    else:
        z = inside @ w["W_enc"] + w["b_enc"]
        features = z.relu()
        if "jumprelu" in architecture:
            features = features * (z > w["threshold"])
        if "topk" in architecture:
            features = top(z, K, architecture == "abstopk")
    out = features @ w["W_dec"] + w["b_dec"]
    if "skip" in architecture:
        out = out + x @ w["W_skip"].T
    assert_close(sae.encode(X), features)
    assert_close(sae.reconstruct(X), out)
    assert sae.reconstruct(X).shape == (7, D_OUT if "transcoder" in architecture else D_IN)
    assert sae.model == "gpt2" and (sae.n_features, sae.d_in) == (D_SAE, D_IN)
    if "transcoder" in architecture:
        assert (sae.point, sae.target) == (HookPoint("mlp_in", 3), HookPoint("mlp_out", 3))
    else:
        assert sae.point == HookPoint("resid", 4)


def test_top_k_by_the_decoders_norms(tmp_path: Path) -> None:
    w = sae_files.write_saelens(tmp_path, "topk", rescale_acts_by_decoder_norm=True)
    sae = read_sae(tmp_path)
    norms = w["W_dec"].norm(dim=1)
    features = top(((X - w["b_dec"]) @ w["W_enc"] + w["b_enc"]) * norms, K, False)
    assert_close(sae.encode(X), features)
    assert_close(sae.reconstruct(X), (features / norms) @ w["W_dec"] + w["b_dec"])


def test_normalizations_are_undone(tmp_path: Path) -> None:
    w = sae_files.write_saelens(tmp_path / "layer", "standard", normalize_activations="layer_norm")
    center, size = X.mean(1, keepdim=True), X.std(1, keepdim=True)
    inside = (X - center) / (size + 1e-5) - w["b_dec"]
    features = (inside @ w["W_enc"] + w["b_enc"]).relu()
    sae = read_sae(tmp_path / "layer")
    assert_close(sae.encode(X), features)
    assert_close(sae.reconstruct(X), (features @ w["W_dec"] + w["b_dec"]) * size + center)
    with pytest.raises(ValidationError, match=r"layer_norm: give decode what prepare returned"):
        sae.decode(features)

    w = sae_files.write_saelens(tmp_path / "norm", "standard", normalize_activations="constant_norm_rescale")
    factor = D_IN**0.5 / X.norm(dim=1, keepdim=True)
    features = ((X * factor - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu()
    sae = read_sae(tmp_path / "norm")
    assert_close(sae.encode(X), features)
    assert_close(sae.reconstruct(X), (features @ w["W_dec"] + w["b_dec"]) / factor)

    plain = sae_files.write_saelens(
        tmp_path / "average", "standard", normalize_activations="expected_average_only_in"
    )
    features = ((X - plain["b_dec"]) @ plain["W_enc"] + plain["b_enc"]).relu()
    assert_close(read_sae(tmp_path / "average").encode(X), features)


def test_heads_side_by_side(tmp_path: Path) -> None:
    metadata = {
        "sae_lens_version": "6.1.0",
        "model_name": "gpt2",
        "hook_name": "blocks.3.attn.hook_z",
    }
    sae_files.write_saelens(tmp_path, "standard", reshape_activations="hook_z", metadata=metadata)
    sae = read_sae(tmp_path)
    assert sae.point == HookPoint("attn_z", 3)
    by_head = X.view(7, 3, 4)
    assert torch.equal(sae.encode(by_head), sae.encode(X))
    assert torch.equal(sae.reconstruct(by_head), sae.reconstruct(X).view(7, 3, 4))


def test_saelens_before_6(tmp_path: Path) -> None:
    w = sae_files.write_old_saelens(tmp_path / "relu")
    sae = read_sae(tmp_path / "relu")
    features = ((X - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu()
    assert_close(sae.encode(X), features)
    assert (sae.point, sae.model) == (HookPoint("resid", 8), "gpt2-small")
    w = sae_files.write_old_saelens(
        tmp_path / "topk", activation_fn_str="topk", activation_fn_kwargs={"k": 3}, apply_b_dec_to_input=False
    )
    assert_close(read_sae(tmp_path / "topk").encode(X), top(X @ w["W_enc"] + w["b_enc"], 3, False))
    sae_files.write_old_saelens(tmp_path / "tanh", activation_fn_str="tanh-relu")
    with pytest.raises(ValidationError, match=r"activation_fn in .*'tanh-relu': relu and topk"):
        read_sae(tmp_path / "tanh")


def test_gemma_scope(tmp_path: Path) -> None:
    folder = tmp_path / "google" / "gemma-scope-2b-pt-res" / "layer_20" / "width_16k" / "average_l0_71"
    w = sae_files.write_gemma_scope(folder)
    sae = read_sae(folder)
    z = X @ w["W_enc"] + w["b_enc"]
    assert_close(sae.encode(X), z.relu() * (z > w["threshold"]))
    assert_close(sae.reconstruct(X), (z.relu() * (z > w["threshold"])) @ w["W_dec"] + w["b_dec"])
    assert (sae.point, sae.model) == (HookPoint("resid", 21), "google/gemma-2-2b")
    folder = tmp_path / "google" / "gemma-scope-2b-pt-res" / "embedding" / "width_4k" / "average_l0_6"
    sae_files.write_gemma_scope(folder)
    z = (X / D_IN**0.5) @ w["W_enc"] + w["b_enc"]
    features = z.relu() * (z > w["threshold"])
    sae = read_sae(folder)
    assert_close(sae.encode(X), features)
    assert_close(sae.reconstruct(X), features @ w["W_dec"] * D_IN**0.5 + w["b_dec"])
    assert sae.point == HookPoint("resid", 0)
    folder = tmp_path / "anywhere"
    sae_files.write_gemma_scope(folder)
    assert read_sae(folder).point is None
    assert read_sae(folder, point="blocks.3.hook_mlp_out").point == HookPoint("mlp_out", 3)


def test_gemma_scope_2(tmp_path: Path) -> None:
    w = sae_files.write_gemma_scope_2(tmp_path / "a")
    sae = read_sae(tmp_path / "a")
    z = X @ w["w_enc"] + w["b_enc"]
    assert_close(sae.encode(X), z.relu() * (z > w["threshold"]))
    assert (sae.point, sae.architecture) == (HookPoint("resid", 14), "jumprelu")
    w = sae_files.write_gemma_scope_2(tmp_path / "b", transcoder=True, affine=True)
    sae = read_sae(tmp_path / "b")
    features = z.relu() * (z > w["threshold"])
    assert_close(sae.reconstruct(X), features @ w["w_dec"] + w["b_dec"] + X @ w["affine_skip_connection"])
    assert (sae.point, sae.target) == (HookPoint("mlp_in", 13), HookPoint("mlp_out", 13))


def test_llama_scope(tmp_path: Path) -> None:
    norm, threshold = 1.7, 0.25
    w = sae_files.write_llama_scope(tmp_path, norm, threshold)
    sae = read_sae(tmp_path)
    factor = D_IN**0.5 / norm
    z = (X * factor) @ w["W_enc"] + w["b_enc"]
    features = z.relu() * (z > threshold * factor)
    assert_close(sae.encode(X), features)
    assert_close(sae.reconstruct(X), (features @ w["W_dec"] + w["b_dec"]) / factor)
    assert sae.point == HookPoint("resid", 21)


def test_sparsify(tmp_path: Path) -> None:
    w = sae_files.write_sparsify(tmp_path / "layers.5")
    sae = read_sae(tmp_path / "layers.5")
    z = (X - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    assert_close(sae.encode(X), top(z.relu(), K, False))
    assert_close(sae.reconstruct(X), top(z.relu(), K, False) @ w["W_dec"] + w["b_dec"])
    assert sae.point == HookPoint("resid", 6)
    sae_files.write_sparsify(tmp_path / "layers.4.mlp", signed=True)
    sae = read_sae(tmp_path / "layers.4.mlp")
    assert_close(sae.encode(X), top(z, K, True))
    assert sae.point == HookPoint("mlp_out", 4)
    sae_files.write_sparsify(tmp_path / "layers.3", num_latents=0, expansion_factor=D_SAE / D_IN)
    with pytest.raises(ValidationError, match=r"expansion_factor in"):
        read_sae(tmp_path / "layers.3")
    sae_files.write_sparsify(tmp_path / "layers.2", num_latents=0, expansion_factor=4)
    with pytest.raises(ValidationError, match=r"\[40, 12\].*\[48, 12\]"):
        read_sae(tmp_path / "layers.2")


@pytest.mark.parametrize(
    "name", ["AutoEncoder", "AutoEncoderTopK", "BatchTopKSAE", "JumpReluAutoEncoder", "GatedAutoEncoder"]
)
def test_dictionary_learning(name: str, tmp_path: Path) -> None:
    w = sae_files.write_dictionary_learning(tmp_path, name)
    sae = read_sae(tmp_path)
    assert (sae.point, sae.model) == (HookPoint("resid", 4), "EleutherAI/pythia-70m-deduped")
    encoder = w["W_enc"] if "W_enc" in w else w["encoder.weight"].T
    decoder = w["W_dec"] if "W_dec" in w else w["decoder.weight"].T
    center = next(w[n] for n in ("b_dec", "bias", "decoder_bias") if n in w)
    z = (X if name == "JumpReluAutoEncoder" else X - center) @ encoder
    if name == "GatedAutoEncoder":
        features = (z + w["gate_bias"] > 0) * (z * w["r_mag"].exp() + w["mag_bias"]).relu()
    else:
        z = z + next(w[n] for n in ("b_enc", "encoder.bias") if n in w)
        features = z.relu()
        if name in ("BatchTopKSAE", "JumpReluAutoEncoder"):
            features = features * (z > w["threshold"])
        if name == "AutoEncoderTopK":
            features = top(z, K, False)
    assert_close(sae.encode(X), features)
    assert_close(sae.reconstruct(X), features @ decoder + center)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_what_is_written_comes_back(architecture: str, dtype: torch.dtype, tmp_path: Path) -> None:
    sae_files.write_saelens(tmp_path / "theirs", architecture, normalize_activations="layer_norm")
    sae = read_sae(tmp_path / "theirs")
    saelens.write(sae, tmp_path / "ours", dtype=dtype)
    back = read_sae(tmp_path / "ours")
    assert back.architecture == sae.architecture
    tolerance = 0.0 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(back.reconstruct(X), sae.reconstruct(X), rtol=tolerance, atol=tolerance)
    assert (back.point, back.target, back.model) == (sae.point, sae.target, sae.model)


def test_features_of_the_whole_are_those_of_a_part(tmp_path: Path) -> None:
    for architecture in ("standard", "gated", "jumprelu"):
        sae_files.write_saelens(tmp_path / architecture, architecture)
        sae = read_sae(tmp_path / architecture)
        torch.testing.assert_close(sae.restricted([3, 31, 4]).encode(X), sae.encode(X)[:, [3, 31, 4]])
        with pytest.raises(ValidationError, match=r"numbered 0 to 39"):
            sae.restricted([40])
    sae_files.write_saelens(tmp_path / "topk", "topk")
    with pytest.raises(ValidationError, match=r"depends on all others"):
        read_sae(tmp_path / "topk").restricted([1])


@pytest.mark.parametrize(
    ("name", "point"),
    [
        ("blocks.4.hook_resid_pre", "resid.4"),
        ("blocks.4.hook_resid_post", "resid.5"),
        ("hook_embed", "resid.0"),
        ("model.layers.4", "resid.5"),
        ("model.layers.4.input", "resid.4"),
        ("transformer.h.11.output", "resid.12"),
        ("gpt_neox.layers.2", "resid.3"),
        ("layers.3.mlp", "mlp_out.3"),
        ("model.layers.3.mlp.input", "mlp_in.3"),
        ("blocks.3.hook_mlp_out", "mlp_out.3"),
        ("blocks.3.attn.hook_z", "attn_z.3"),
        ("blocks.3.hook_attn_out", "attn_out.3"),
        ("model.layers.3.self_attn.o_proj.input", "attn_z.3"),
        ("model.layers.3.self_attn", "attn_out.3"),
        ("resid.7", "resid.7"),
    ],
)
def test_places_have_one_name(name: str, point: str) -> None:
    assert str(hook_point(name)) == point
    assert hook_point(hook_point(name).lens_name) == hook_point(name)


@pytest.mark.parametrize("name", ["", "blocks.4.hook_pattern", "lm_head", "resid.-1", "model.layers.x", 4])
def test_unknown_places_are_refused(name: object) -> None:
    with pytest.raises(ValidationError, match=r"hook point .* is not known: name it"):
        hook_point(name)  # type: ignore[arg-type]


# Unsound files


@pytest.mark.parametrize("kind", sae_files.WRITERS)
def test_files_that_are_cut_off_are_refused(kind: str, tmp_path: Path) -> None:
    sae_files.WRITERS[kind](tmp_path)
    for path in [p for p in sorted(tmp_path.rglob("*")) if p.is_file()]:
        whole = path.read_bytes()
        for size in (0, 7, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:size])
            with pytest.raises(ValidationError, match=path.name):
                read_sae(path.parents[len(path.relative_to(folder_of(kind, tmp_path)).parts) - 1])
        path.write_bytes(whole)
    read_sae(folder_of(kind, tmp_path))


def folder_of(kind: str, root: Path) -> Path:
    return root / "layers.5" if kind == "sparsify" else root


@pytest.mark.parametrize("kind", sae_files.WRITERS)
def test_a_missing_file_is_named(kind: str, tmp_path: Path) -> None:
    sae_files.WRITERS[kind](tmp_path)
    for path in [p for p in sorted(tmp_path.rglob("*")) if p.is_file()]:
        whole = path.read_bytes()
        path.unlink()
        with pytest.raises((NotFoundError, ValidationError), match=path.name):
            read_sae(folder_of(kind, tmp_path))
        path.write_bytes(whole)


class _Runs:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


def test_code_in_pickles_does_not_run(tmp_path: Path) -> None:
    sae_files.write_dictionary_learning(tmp_path, "AutoEncoder")
    ran = tmp_path / "ran"
    torch.save({"encoder.weight": _Runs(ran)}, tmp_path / "ae.pt")
    with pytest.raises(ValidationError, match=r"ae.pt is not a readable torch file .*only running") as told:
        read_sae(tmp_path)
    assert "weights_only" not in str(told.value)  # torch advises to turn that off
    (tmp_path / "ae.pt").write_bytes(pickle.dumps(_Runs(ran)))
    with pytest.raises(ValidationError, match=r"ae.pt is not a readable torch file"):
        read_sae(tmp_path)
    folder = tmp_path / "gemma-scope-2b-pt-res" / "layer_1"
    sae_files.write_gemma_scope(folder)
    numpy.savez(folder / "params.npz", w_enc=numpy.array([_Runs(ran)], dtype=object))
    with pytest.raises(ValidationError, match=r"params.npz is not a readable NumPy file"):
        read_sae(folder)
    assert not ran.exists()


def test_settings_that_are_not_supported_say_so(tmp_path: Path) -> None:
    for architecture in ("temporal", "matching_pursuit"):
        sae_files.write_saelens(tmp_path, "standard", architecture=architecture)
        with pytest.raises(ValidationError, match=f"{architecture}.*can't be watched token by token"):
            read_sae(tmp_path)
    sae_files.write_saelens(tmp_path, "standard", architecture="transformer")
    with pytest.raises(ValidationError, match=r"'transformer'; those that are read: standard"):
        read_sae(tmp_path)
    sae_files.write_saelens(tmp_path, "standard", normalize_activations="covariance_whitening")
    with pytest.raises(ValidationError, match=r"'covariance_whitening'; those that are read: none"):
        read_sae(tmp_path)
    sae_files.write_saelens(tmp_path, "transcoder", apply_b_dec_to_input=True)
    with pytest.raises(ValidationError, match=r"no transcoder takes its output's bias off"):
        read_sae(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"d_in": 13}, r"W_enc .* has shape \[12, 40\], and its configuration says \[13, 40\]"),
        ({"d_sae": 10**12}, "d_sae in .* is 1000000000000, and a whole number from 1 to"),
        ({"d_in": "12"}, "d_in in .* is '12'"),
        ({"d_in": None}, "d_in in .* is missing"),
        ({"metadata": []}, "metadata in .* is \\[\\], and an object"),
        ({"apply_b_dec_to_input": "yes"}, "apply_b_dec_to_input in .* is 'yes', and true or false"),
        ({"architecture": "topk", "k": 41}, "k is from 1 to the 40 features; got 41"),
        ({"architecture": "jumprelu"}, "has no tensor threshold; it has W_dec"),
        ({"architecture": "gated"}, "has no tensor b_gate; it has W_dec"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(
    settings: dict[str, object], message: str, tmp_path: Path
) -> None:
    sae_files.write_saelens(tmp_path, "standard", **settings)
    with pytest.raises(ValidationError, match=message):
        read_sae(tmp_path)


def test_numbers_that_are_none_are_refused(tmp_path: Path) -> None:
    w = sae_files.write_saelens(tmp_path, "standard")
    w["W_enc"][3, 4] = float("nan")
    save_file(w, tmp_path / "sae_weights.safetensors")
    with pytest.raises(ValidationError, match=r"encoder holds NaN or infinite numbers"):
        read_sae(tmp_path)
    sae_files.write_old_saelens(tmp_path)
    (tmp_path / "cfg.json").write_text("[" * 100_000)
    with pytest.raises(ValidationError, match=r"cfg.json is not a readable JSON file"):
        read_sae(tmp_path)
    w = sae_files.write_old_saelens(tmp_path)
    save_file(w | {"scaling_factor": draw(D_SAE)}, tmp_path / "sae_weights.safetensors")
    with pytest.raises(ValidationError, match=r"factors of their own"):
        read_sae(tmp_path)


def test_activations_of_another_width_are_refused(tmp_path: Path) -> None:
    sae_files.write_saelens(tmp_path, "standard")
    with pytest.raises(
        ValidationError, match=r"16 wide and the autoencoder reads 12: it was made for gpt2 at resid.4"
    ):
        read_sae(tmp_path).encode(torch.zeros(2, 16))


def test_where_nothing_is(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"there is no folder"):
        read_sae(str(tmp_path / "nowhere"))
    with pytest.raises(
        ValidationError, match=r"holds no autoencoder \(nothing is in it\). Known are SAELens"
    ):
        read_sae(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValidationError, match=r"is a file; an autoencoder is read from its folder"):
        read_sae(tmp_path / "file")
    with pytest.raises(NotFoundError, match=r"the Hub could not be reached"):
        read_sae("nobody/nothing/layer_1")
    with pytest.raises(ValidationError, match=r"an object of sae_lens.SAE is expected; got int"):
        read_sae(3)


# Names


def test_models_names_find_their_autoencoder(tmp_path: Path, mechanex_home: Path) -> None:
    sae_files.write_saelens(tmp_path / "mine", "standard")
    with pytest.raises(
        NotFoundError, match=r"no sparse autoencoder is known for 'my-model'. Known are those for"
    ):
        registry.find("my-model")
    assert registry.find("google/gemma-2-2b").source.startswith("google/gemma-scope-2b-pt-res/layer_20")
    assert registry.find("unsloth/Gemma-2-2B").name == "gemma-scope-2b-20"
    entry = registry.Entry("mine", ("org/my-model", "gpt2"), str(tmp_path / "mine"), "resid.2", "a note")
    registry.add(entry)
    assert registry.find("my-model") == entry == registry.find("gpt2")
    assert registry.default_sae("/models/my-model/").point == HookPoint("resid", 2)
    assert registry.load("mine").n_features == D_SAE
    assert registry.load(str(tmp_path / "mine")).point == HookPoint("resid", 4)
    again = registry.Entry("mine", ("my-model",), str(tmp_path / "mine"))
    registry.add(again)
    assert [e for e in registry.entries() if e.name == "mine"] == [again]
    assert json.loads((mechanex_home / "saes.json").read_text())["mine"]["models"] == ["my-model"]


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"mine": 3}, "'mine' in .* is 3, and an object is expected"),
        ({"mine": {"models": ["a"]}}, "needs 'source'"),
        ({"mine": {"models": "a", "source": "b"}}, "models of 'mine' in .* is a list of names"),
        ({"mine": {"models": [], "source": "b", "layer": 3}}, r"it has \['layer'\]"),
        ({"mine": {"models": [], "source": "b", "point": "x"}}, "hook point 'x' is not known"),
    ],
)
def test_a_list_of_ones_own_is_checked(told: object, message: str, mechanex_home: Path) -> None:
    mechanex_home.mkdir()
    (mechanex_home / "saes.json").write_text(json.dumps(told))
    with pytest.raises(ValidationError, match=message):
        registry.entries()


def test_a_source_without_a_name_is_no_folder() -> None:
    with pytest.raises(ValidationError, match="a folder or a Hub name is expected; got ''"):
        read_sae("")
