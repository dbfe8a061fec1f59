"""Autoencoders in the formats of other libraries, as those libraries write them, with random weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors.torch import save_file
from torch import Tensor

D_IN, D_SAE, D_OUT, K = 12, 40, 9, 5


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Random numbers, each name's own by its seed."""
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def parts(d_out: int = D_IN) -> dict[str, Tensor]:
    """The weights that all have, in SAELens' names and shapes."""
    return {
        "W_enc": draw(D_IN, D_SAE, seed=1, scale=0.4),
        "b_enc": draw(D_SAE, seed=2, scale=0.3),
        "W_dec": draw(D_SAE, d_out, seed=3, scale=0.5),
        "b_dec": draw(d_out, seed=4, scale=0.5),
    }


def write_saelens(folder: Path, architecture: str, /, **settings: Any) -> dict[str, Tensor]:
    """A folder of SAELens 6; returns the weights."""
    transcoder = "transcoder" in architecture
    tensors = parts(D_OUT if transcoder else D_IN)
    if "jumprelu" in architecture:
        tensors["threshold"] = draw(D_SAE, seed=5).abs()
    if architecture == "gated":
        tensors["b_gate"] = tensors.pop("b_enc")
        tensors |= {"r_mag": draw(D_SAE, seed=6, scale=0.3), "b_mag": draw(D_SAE, seed=7, scale=0.3)}
    if "skip" in architecture:
        tensors["W_skip"] = draw(D_OUT, D_IN, seed=8)
    config: dict[str, Any] = {
        "architecture": architecture,
        "d_in": D_IN,
        "d_sae": D_SAE,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": not transcoder,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": "6.54.0",
            "model_name": "gpt2",
            "hook_name": "blocks.3.hook_resid_post",
        },
    }
    if transcoder:
        config |= {"d_out": D_OUT}
        config["metadata"] |= {"hook_name": "blocks.3.hook_mlp_in", "hook_name_out": "blocks.3.hook_mlp_out"}
    if "topk" in architecture:
        config |= {"k": K, "rescale_acts_by_decoder_norm": False}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cfg.json").write_text(json.dumps(config | settings))
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "sae_weights.safetensors"
    )
    return tensors


def write_old_saelens(folder: Path, **settings: Any) -> dict[str, Tensor]:
    """A folder of a SAELens before 6."""
    tensors = parts() | {"scaling_factor": torch.ones(D_SAE)}
    config = {
        "d_in": D_IN,
        "d_sae": D_SAE,
        "dtype": "float32",
        "device": "cpu",
        "model_name": "gpt2-small",
        "hook_point": "blocks.8.hook_resid_pre",
        "hook_point_layer": 8,
        "activation_fn_str": "relu",
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cfg.json").write_text(json.dumps(config | settings))
    save_file(tensors, folder / "sae_weights.safetensors")
    return tensors


def write_gemma_scope(folder: Path) -> dict[str, Tensor]:
    """``params.npz`` under a folder such as ``gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71``."""
    tensors = parts() | {"threshold": draw(D_SAE, seed=5).abs()}
    folder.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = {name.replace("W_", "w_"): tensor.numpy() for name, tensor in tensors.items()}
    numpy.savez(folder / "params.npz", **arrays)
    return tensors


def write_gemma_scope_2(folder: Path, *, transcoder: bool = False, affine: bool = False) -> dict[str, Tensor]:
    """``config.json`` and ``params.safetensors``."""
    tensors = parts(D_OUT if transcoder else D_IN) | {"threshold": draw(D_SAE, seed=5).abs()}
    stored = {name.replace("W_", "w_"): tensor for name, tensor in tensors.items()}
    config: dict[str, Any] = {
        "architecture": "jump_relu",
        "model_name": "gemma-v3-1b-it",
        "hf_hook_point_in": "model.layers.13.output",
    }
    if transcoder:
        config["hf_hook_point_in"] = "model.layers.13.pre_feedforward_layernorm.output"
        config["hf_hook_point_out"] = "model.layers.13.post_feedforward_layernorm.output"
    if affine:
        stored["affine_skip_connection"] = draw(D_IN, D_OUT, seed=8)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, folder / "params.safetensors")
    return stored


def write_llama_scope(folder: Path, norm: float = 1.7, threshold: float = 0.25) -> dict[str, Tensor]:
    """``hyperparams.json`` and ``checkpoints/final.safetensors``."""
    tensors = parts()
    stored = {
        "encoder.weight": tensors["W_enc"].T.contiguous(),
        "encoder.bias": tensors["b_enc"],
        "decoder.weight": tensors["W_dec"].T.contiguous(),
        "decoder.bias": tensors["b_dec"],
    }
    config = {
        "d_model": D_IN,
        "d_sae": D_SAE,
        "hook_point_in": "blocks.20.hook_resid_post",
        "hook_point_out": "blocks.20.hook_resid_post",
        "act_fn": "jumprelu",
        "jump_relu_threshold": threshold,
        "dataset_average_activation_norm": {"in": norm, "out": norm},
    }
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    (folder / "hyperparams.json").write_text(json.dumps(config))
    save_file(stored, folder / "checkpoints" / "final.safetensors")
    return tensors


def write_sparsify(folder: Path, *, linear: bool = False, **settings: Any) -> dict[str, Tensor]:
    """``cfg.json`` and ``sae.safetensors`` in a folder named by its layer; ``linear``: the decoder in a layer."""
    tensors = parts()
    stored = {
        "encoder.weight": tensors["W_enc"].T.contiguous(),
        "encoder.bias": tensors["b_enc"],
        "W_dec": tensors["W_dec"],
        "b_dec": tensors["b_dec"],
    }
    if linear:
        stored["decoder.weight"] = stored.pop("W_dec").T.contiguous()
    config = {
        "d_in": D_IN,
        "expansion_factor": 32,
        "num_latents": D_SAE,
        "k": K,
        "signed": False,
        "normalize_decoder": False,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cfg.json").write_text(json.dumps(config | settings))
    save_file(stored, folder / "sae.safetensors")
    return tensors


def write_dictionary_learning(folder: Path, dict_class: str) -> dict[str, Tensor]:
    """``config.json`` and ``ae.pt``."""
    tensors = parts()
    stored: dict[str, Tensor] = {
        "encoder.weight": tensors["W_enc"].T.contiguous(),
        "decoder.weight": tensors["W_dec"].T.contiguous(),
        "encoder.bias": tensors["b_enc"],
        "b_dec": tensors["b_dec"],
    }
    trainer: dict[str, Any] = {
        "dict_class": dict_class,
        "activation_dim": D_IN,
        "dict_size": D_SAE,
        "layer": 3,
        "lm_name": "EleutherAI/pythia-70m-deduped",
        "submodule_name": "resid_post_layer_3",
    }
    if dict_class == "AutoEncoder":
        stored["bias"] = stored.pop("b_dec")
    if dict_class == "AutoEncoderTopK":
        trainer["k"] = K
        stored |= {"k": torch.tensor(K), "threshold": torch.tensor(0.3)}
    if dict_class in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
        trainer["k"] = K
        stored |= {"k": torch.tensor(K), "threshold": torch.tensor(0.3)}
    if dict_class == "JumpReluAutoEncoder":
        stored = {**tensors, "threshold": draw(D_SAE, seed=5).abs()}
    if dict_class == "GatedAutoEncoder":
        del stored["encoder.bias"]
        stored["decoder_bias"] = stored.pop("b_dec")
        stored |= {
            "gate_bias": draw(D_SAE, seed=2, scale=0.3),
            "r_mag": draw(D_SAE, seed=6, scale=0.3),
            "mag_bias": draw(D_SAE, seed=7, scale=0.3),
        }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"ctx_len": 128}}))
    torch.save(stored, folder / "ae.pt")
    return stored


WRITERS: dict[str, Callable[[Path], dict[str, Tensor]]] = {
    "saelens": lambda folder: write_saelens(folder, "jumprelu"),
    "gemma-scope": write_gemma_scope,
    "gemma-scope-2": write_gemma_scope_2,
    "llama-scope": write_llama_scope,
    "sparsify": lambda folder: write_sparsify(folder / "layers.5"),
    "dictionary-learning": lambda folder: write_dictionary_learning(folder, "BatchTopKSAE"),
}
