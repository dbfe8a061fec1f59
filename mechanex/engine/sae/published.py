"""Formats of published collections: Gemma Scope, Gemma Scope 2, Llama Scope, sparsify and dictionary_learning."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import ValidationError
from .autoencoder import Activation, SparseAutoencoder
from .files import Weights, number, read_json, read_npz, read_pickled, read_safetensors, switch, text, whole
from .hook_points import HookPoint, hook_point

__all__ = [
    "read_dictionary_learning",
    "read_gemma_scope",
    "read_gemma_scope_2",
    "read_llama_scope",
    "read_sparsify",
]

_SPARSIFY_LAYER = re.compile(r"layers[._](\d+)(?:[._](\w+))?")


def read_gemma_scope(folder: Path) -> SparseAutoencoder:
    """Gemma Scope's ``params.npz``: a JumpReLU autoencoder, its place told by the names of its folders.

    Raises:
        NotFoundError: a file is missing.
        ValidationError: files that aren't of the format; so also below.
    """
    weights = read_npz(folder / "params.npz")
    encoder = weights.matrix(None, "w_enc", "W_enc")
    names = "/".join(folder.parts)
    embedding = "embedding" in folder.parts
    parts = {"transcoder": "mlp_in", "-att": "attn_z", "-mlp": "mlp_out", "-res": "resid"}
    kind = next((kind for part, kind in parts.items() if part in names), None)
    layer = re.search(r"layer_(\d+)(?!.*layer_\d)", names)
    point = target = None
    if embedding:
        point = HookPoint("resid", 0)
    elif kind is not None and layer is not None:
        at = int(layer[1])
        point = HookPoint(kind, at + (kind == "resid"))  # type: ignore[arg-type]
        target = HookPoint("mlp_out", at) if kind == "mlp_in" else None
    transcoder = kind == "mlp_in"
    # Those of the embeddings were trained on embeddings that weren't multiplied by √d yet, as the stream is.
    scale = encoder.shape[0] ** 0.5 if embedding else 1.0
    size = re.search(r"gemma-scope-(\d+b)-(pt|it)", names)
    model = None if size is None else f"google/gemma-2-{size[1]}{'-it' if size[2] == 'it' else ''}"
    return _jumprelu(
        weights,
        encoder / scale,
        weights.matrix(None, "w_dec", "W_dec") * scale,
        weights.take("threshold"),
        architecture="jumprelu_transcoder" if transcoder else "jumprelu",
        point=point,
        target=target,
        model=model,
        source=str(folder),
        by_head=False,
    )


def read_gemma_scope_2(folder: Path) -> SparseAutoencoder:
    """Gemma Scope 2's ``config.json`` and ``params.safetensors``."""
    path = folder / "config.json"
    config, weights = read_json(path), read_safetensors(folder / "params.safetensors")
    if config.get("architecture") != "jump_relu":
        raise ValidationError(
            f"architecture in {path} is {config.get('architecture')!r:.60}, and Gemma Scope 2 has 'jump_relu'."
        )
    out = text(config, "hf_hook_point_out", path)
    skip = weights.matrix(None, "affine_skip_connection") if "affine_skip_connection" in weights else None
    decoder = weights.take("w_dec")
    if decoder.dim() != 2:
        raise ValidationError(
            f"w_dec in {weights.path} has shape {list(decoder.shape)}: a transcoder that writes to several layers "
            "isn't read."
        )
    within = text(config, "hf_hook_point_in", path)
    if within is None:
        raise ValidationError(
            f"hf_hook_point_in in {path} is missing: it says where the activations are read."
        )
    transcoder = out is not None and out != within
    name = "jumprelu_skip_transcoder" if skip is not None else "jumprelu_transcoder"
    return _jumprelu(
        weights,
        weights.matrix(None, "w_enc"),
        decoder,
        weights.take("threshold"),
        architecture=name if transcoder else "jumprelu",
        point=hook_point(within),
        target=hook_point(out) if transcoder and out is not None else None,
        model=text(config, "model_name", path),
        source=str(folder),
        skip=None if skip is None else skip.T.float().contiguous(),
    )


def read_llama_scope(folder: Path) -> SparseAutoencoder:
    """Llama Scope's ``hyperparams.json`` and ``checkpoints/final.safetensors``: one threshold, inputs of norm √d.

    The factor that brings the average norm to √d is put into the weights, and into the threshold with them.
    """
    path = folder / "hyperparams.json"
    config, weights = read_json(path), read_safetensors(folder / "checkpoints" / "final.safetensors")
    d_in, d_sae = whole(config, "d_model", path), whole(config, "d_sae", path)
    norms = config.get("dataset_average_activation_norm")
    norm = number(norms if isinstance(norms, dict) else {}, "in", path)
    if norm <= 0:
        raise ValidationError(f"dataset_average_activation_norm in {path} is {norm}, and a norm is above 0.")
    factor = d_in**0.5 / norm
    place = text(config, "hook_point_in", path)
    threshold = torch.full((d_sae,), number(config, "jump_relu_threshold", path) * factor)
    return SparseAutoencoder(
        encoder=(weights.matrix((d_sae, d_in), "encoder.weight").float() * factor).contiguous(),
        bias=weights.take("encoder.bias").float(),
        decoder=(weights.matrix((d_in, d_sae), "decoder.weight").T.float() / factor).contiguous(),
        decoder_bias=weights.take("decoder.bias").float() / factor,
        activation="jumprelu",
        threshold=threshold,
        point=None if place is None else hook_point(place),
        model=text(config, "model_name", path) or "meta-llama/Llama-3.1-8B",
        architecture="jumprelu",
        source=str(folder),
    )


def read_sparsify(folder: Path) -> SparseAutoencoder:
    """sparsify's ``cfg.json`` and ``sae.safetensors``: top-k, by size and with signs where ``signed``."""
    path = folder / "cfg.json"
    config, weights = read_json(path), read_safetensors(folder / "sae.safetensors")
    d_in = whole(config, "d_in", path)
    given = config.get("num_latents")
    d_sae = given if given else d_in * whole(config, "expansion_factor", path)
    d_sae = whole({"num_latents": d_sae}, "num_latents", path)
    kind = config.get("activation", "topk")
    if kind != "topk":
        raise ValidationError(f"activation in {path} is {kind!r:.60}; topk is read.")
    transcodes = switch(config, "transcode", path, False)
    if "encoder.weight" in weights:
        encoder = weights.matrix((d_sae, d_in), "encoder.weight")
    else:
        encoder = weights.matrix((d_in, d_sae), "W_enc").T
    place = _SPARSIFY_LAYER.search(folder.name)
    point = target = None
    if place is not None:
        point = hook_point(f"layers.{place[1]}{f'.{place[2]}' if place[2] else ''}")
        if transcodes and point.kind == "mlp_out":
            point, target = HookPoint("mlp_in", point.layer), point
    elif folder.name == "embed_tokens":
        point = HookPoint("resid", 0)
    skip = weights.get("W_skip")
    beside = folder.parent / "config.json"
    model = text(read_json(beside), "model", beside) if beside.exists() else None
    transcoder = "skip_transcoder" if skip is not None else "transcoder"
    bias, decoder_bias = weights.get("encoder.bias", "b_enc"), weights.get("b_dec", "decoder.bias")
    return SparseAutoencoder(
        encoder=encoder.float().contiguous(),
        bias=torch.zeros(d_sae) if bias is None else bias.float(),
        decoder=_sparsify_decoder(weights, d_sae, d_in),
        decoder_bias=torch.zeros(d_in) if decoder_bias is None else decoder_bias.float(),
        activation="abstopk" if switch(config, "signed", path, False) else "topk",
        k=whole(config, "k", path),
        subtract_decoder_bias=not transcodes,
        skip=None if skip is None else skip.float().contiguous(),
        point=point,
        target=target,
        model=model,
        architecture=transcoder if transcodes else "topk",
        source=str(folder),
        notes={"normalize_decoder": config.get("normalize_decoder", True)},
    )


def _sparsify_decoder(weights: Weights, d_sae: int, d_in: int) -> Tensor:
    """[d_sae, d_out]; ``decoder.weight`` is a linear layer's, the other way round."""
    found = weights.get("W_dec")
    found = weights.matrix((d_in, d_sae), "decoder.weight").T if found is None else found
    if found.shape[:1] != (d_sae,) or found.dim() != 2:
        raise ValidationError(
            f"W_dec in {weights.path} has shape {list(found.shape)}, and its configuration says {[d_sae, d_in]}."
        )
    return found.float().contiguous()


# What each class does to its input, and how it makes features of the products.
_CLASSES: dict[str, tuple[Activation, bool]] = {
    "AutoEncoder": ("relu", True),
    "AutoEncoderNew": ("relu", False),
    "GatedAutoEncoder": ("gated", True),
    "JumpReluAutoEncoder": ("jumprelu", False),
    "AutoEncoderTopK": ("topk", True),
    "BatchTopKSAE": ("jumprelu", True),
    "MatryoshkaBatchTopKSAE": ("jumprelu", True),
}


def read_dictionary_learning(folder: Path) -> SparseAutoencoder:
    """dictionary_learning's ``config.json`` and ``ae.pt``, which torch reads without running code."""
    path = folder / "config.json"
    config = read_json(path)
    trainer: Any = config.get("trainer")
    if not isinstance(trainer, dict):
        raise ValidationError(f"trainer in {path} is missing: it names the class and the sizes.")
    name = text(trainer, "dict_class", path)
    if name not in _CLASSES:
        raise ValidationError(
            f"dict_class in {path} is {name!r:.60}; those that are read: {', '.join(_CLASSES)}."
        )
    activation, subtract = _CLASSES[name]
    weights = read_pickled(folder / "ae.pt")
    d_in, d_sae = whole(trainer, "activation_dim", path), whole(trainer, "dict_size", path)
    if "W_enc" in weights:
        encoder = weights.matrix((d_in, d_sae), "W_enc").T
        decoder = weights.matrix((d_sae, d_in), "W_dec")
    else:
        encoder = weights.matrix((d_sae, d_in), "encoder.weight")
        decoder = weights.matrix((d_in, d_sae), "decoder.weight").T
    gated = activation == "gated"
    threshold = weights.take("threshold").float() if activation == "jumprelu" else None
    if threshold is not None and threshold.dim() == 0:
        threshold = threshold.expand(d_sae).contiguous()
    return SparseAutoencoder(
        encoder=encoder.float().contiguous(),
        bias=weights.take(*(("gate_bias",) if gated else ("b_enc", "encoder.bias"))).float(),
        decoder=decoder.float().contiguous(),
        decoder_bias=weights.take("b_dec", "bias", "decoder_bias", "decoder.bias").float(),
        activation=activation,
        threshold=threshold,
        gain=weights.take("r_mag").float() if gated else None,
        offset=weights.take("mag_bias").float() if gated else None,
        k=whole(trainer, "k", path) if activation == "topk" else None,
        subtract_decoder_bias=subtract,
        point=_dictionary_point(trainer, path),
        model=text(trainer, "lm_name", path),
        architecture={"relu": "standard"}.get(activation, activation),
        source=str(folder),
    )


def _dictionary_point(trainer: dict[str, Any], path: Path) -> HookPoint | None:
    """``layer`` is a block's number; ``submodule_name`` says what of it is read, the stream leaving it if nothing."""
    layer = trainer.get("layer")
    if isinstance(layer, bool) or not isinstance(layer, int) or layer < 0:
        return None
    part = text(trainer, "submodule_name", path) or "resid_post"
    kinds = {"resid": "resid_post", "mlp": "mlp_out", "att": "attn_out"}
    found = next((name for start, name in kinds.items() if part.startswith(start)), None)
    return None if found is None else hook_point(f"blocks.{layer}.hook_{found}")


def _jumprelu(
    weights: Weights, encoder: Tensor, decoder: Tensor, threshold: Tensor, **facts: Any
) -> SparseAutoencoder:
    """A JumpReLU autoencoder of ``encoder`` [d_in, d_sae] that takes no bias off its input."""
    return SparseAutoencoder(
        encoder=encoder.float().T.contiguous(),
        bias=weights.take("b_enc").float(),
        decoder=decoder.float().contiguous(),
        decoder_bias=weights.take("b_dec").float(),
        activation="jumprelu",
        threshold=threshold.float(),
        **facts,
    )
