"""SAELens' format: ``cfg.json`` and ``sae_weights.safetensors``, of version 6 and of those before; and its objects."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..._version import __version__
from ...errors import ValidationError
from ...home import atomic_path
from .autoencoder import Activation, SparseAutoencoder
from .files import Weights, read_json, read_safetensors, switch, text, whole
from .hook_points import HookPoint, hook_point

__all__ = ["CONFIG", "WEIGHTS", "from_object", "read", "write"]

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
# The last version that SAELens' own reader takes for the format of before 6 is 6.0.0-rc.0.
_WRITES_LIKE = "6.54.0"

_ACTIVATIONS: dict[str, Activation] = {
    "standard": "relu",
    "gated": "gated",
    "topk": "topk",
    "abstopk": "abstopk",
    "jumprelu": "jumprelu",
    "transcoder": "relu",
    "skip_transcoder": "relu",
    "jumprelu_transcoder": "jumprelu",
    "jumprelu_skip_transcoder": "jumprelu",
}
_REFUSED = {
    "temporal": "its features depend on the tokens before",
    "matching_pursuit": "its features are found one after another, each in what the others leave",
}
# Nothing is done for the second when activations are encoded: its factor is in the weights.
_NORMALIZATIONS = ("none", "expected_average_only_in", "layer_norm", "constant_norm_rescale")
_SPARE = ("device", "metadata", "dtype", "d_in", "d_sae", "d_out", "architecture")


def read(folder: Path) -> SparseAutoencoder:
    """Reads a folder that SAELens wrote; weights are widened to float32.

    Raises:
        NotFoundError: a file is missing.
        ValidationError: an architecture or a setting that isn't supported, or files that don't fit together.
    """
    path = folder / CONFIG
    return build(_as_version_6(read_json(path), path), read_safetensors(folder / WEIGHTS), path)


def from_object(sae: Any) -> SparseAutoencoder:
    """What a ``sae_lens.SAE`` object computes; its weights are copied, in float32.

    Raises:
        ValidationError: another object, or one of an architecture that isn't supported.
    """
    config = getattr(sae, "cfg", None)
    state = sae.state_dict() if hasattr(sae, "state_dict") else None
    if config is None or not state or not hasattr(config, "to_dict"):
        raise ValidationError(f"an object of sae_lens.SAE is expected; got {type(sae).__name__}.")
    path = Path(f"<{type(sae).__name__}>")
    told = config.to_dict()
    if is_dataclass(told.get("metadata")) and not isinstance(told["metadata"], type):
        told["metadata"] = asdict(told["metadata"])
    tensors = {name: value.detach().cpu().clone() for name, value in state.items()}
    return build(_as_version_6(told, path), Weights(path, tensors), path)


def _as_version_6(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """A configuration in the words of version 6: what names the model and the place under ``metadata``."""
    metadata = config.get("metadata", {})
    if not isinstance(metadata, dict):
        raise ValidationError(f"metadata in {path} is {metadata!r:.60}, and an object is expected.")
    version = config.get("sae_lens_version") or metadata.get("sae_lens_version")
    if isinstance(version, str) and version.split(".")[0].isdecimal() and int(version.split(".")[0]) >= 6:
        return {**config, "metadata": metadata}
    renamed = {"hook_point": "hook_name", "activation_fn_str": "activation_fn"}
    new = {renamed.get(name, name): value for name, value in config.items()}
    new.setdefault("architecture", "standard")
    arguments = new.get("activation_fn_kwargs") or {}
    if new.get("activation_fn") == "topk" and isinstance(arguments, dict) and arguments.get("k") is not None:
        new["architecture"], new["k"] = "topk", arguments["k"]
    elif new.get("activation_fn", "relu") != "relu":
        raise ValidationError(
            f"activation_fn in {path} is {new['activation_fn']!r:.60}: relu and topk are read."
        )
    if isinstance(given := new.get("normalize_activations"), bool):
        new["normalize_activations"] = "expected_average_only_in" if given else "none"
    if new.get("normalize_activations") is None:
        new["normalize_activations"] = "none"
    by_head = "hook_z" in str(new.get("hook_name", ""))
    new.setdefault("reshape_activations", "hook_z" if by_head else "none")
    new.setdefault("apply_b_dec_to_input", True)
    known = {"model_name", "hook_name", "hook_name_out", "hf_hook_name", "hf_hook_name_out"}
    new["metadata"] = {**{name: value for name, value in new.items() if name in known}, **metadata}
    return new


def build(config: Mapping[str, Any], weights: Weights, path: Path) -> SparseAutoencoder:
    """An autoencoder of a configuration in the words of SAELens 6 and its weights.

    Args:
        config: as ``cfg.json``.
        weights: ``W_enc``, ``W_dec``, …
        path: where the configuration is from, for messages.
    """
    architecture = text(config, "architecture", path) or "standard"
    if architecture in _REFUSED:
        raise ValidationError(
            f"{path} is of the architecture {architecture!r}, which can't be watched token by token: "
            f"{_REFUSED[architecture]}. Those that are read: {', '.join(_ACTIVATIONS)}."
        )
    if architecture not in _ACTIVATIONS:
        raise ValidationError(
            f"{path} is of the architecture {architecture!r:.60}; those that are read: {', '.join(_ACTIVATIONS)}."
        )
    activation = _ACTIVATIONS[architecture]
    normalization = text(config, "normalize_activations", path) or "none"
    if normalization not in _NORMALIZATIONS:
        raise ValidationError(
            f"normalize_activations in {path} is {normalization!r:.60}; those that are read: "
            f"{', '.join(_NORMALIZATIONS)}."
        )
    reshape = text(config, "reshape_activations", path) or "none"
    if reshape not in ("none", "hook_z"):
        raise ValidationError(f"reshape_activations in {path} is {reshape!r:.60}; none and hook_z are read.")
    transcoder = "transcoder" in architecture
    subtract = switch(config, "apply_b_dec_to_input", path, not transcoder)
    if transcoder and subtract:
        raise ValidationError(
            f"apply_b_dec_to_input in {path} is true, and no transcoder takes its output's bias off its input."
        )
    d_in, d_sae = whole(config, "d_in", path), whole(config, "d_sae", path)
    d_out = whole(config, "d_out", path) if transcoder else d_in
    _check_scaling(weights)
    gated = activation == "gated"
    topk = activation in ("topk", "abstopk")
    metadata = config.get("metadata", {})
    skip = weights.matrix((d_out, d_in), "W_skip") if "skip" in architecture else None

    def wide(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.float().contiguous()

    def needed(tensor: Tensor) -> Tensor:
        return tensor.float().contiguous()

    return SparseAutoencoder(
        encoder=needed(weights.matrix((d_in, d_sae), "W_enc").T),
        bias=needed(weights.take("b_gate" if gated else "b_enc")),
        decoder=needed(weights.matrix((d_sae, d_out), "W_dec")),
        decoder_bias=needed(weights.take("b_dec")),
        activation=activation,
        threshold=needed(weights.take("threshold")) if activation == "jumprelu" else None,
        gain=wide(weights.take("r_mag")) if gated else None,
        offset=wide(weights.take("b_mag")) if gated else None,
        k=whole(config, "k", path, 100) if topk else None,
        by_decoder_norm=topk and switch(config, "rescale_acts_by_decoder_norm", path, False),
        subtract_decoder_bias=subtract,
        normalization="none" if normalization == "expected_average_only_in" else normalization,  # type: ignore[arg-type]
        skip=wide(skip),
        point=_point(metadata, "hook_name", "hf_hook_name", path),
        target=_point(metadata, "hook_name_out", "hf_hook_name_out", path) if transcoder else None,
        by_head=reshape == "hook_z",
        model=text(metadata, "model_name", path),
        architecture=architecture,
        source=str(path.parent),
        notes={name: value for name, value in config.items() if name not in _SPARE},
    )


def _check_scaling(weights: Weights) -> None:
    factor = weights.get("scaling_factor", "finetuning_scaling_factor")
    if factor is not None and not torch.allclose(factor.float(), torch.ones(())):
        raise ValidationError(
            f"{weights.path} scales its features by factors of their own (finetuning_scaling_factor), which SAELens "
            "dropped with version 6: multiply the decoder's rows by them and write it anew."
        )


def _point(metadata: Mapping[str, Any], name: str, other: str, path: Path) -> HookPoint | None:
    """The place that a file names; one that this library has no name for is none, and is asked for when needed."""
    for key in (name, other):
        given = text(metadata, key, path)
        if given is not None:
            try:
                return hook_point(given)
            except ValidationError:
                continue
    return None


def write(
    sae: SparseAutoencoder,
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    notes: Mapping[str, Any] | None = None,
) -> None:
    """Writes an autoencoder as SAELens does, so that SAELens reads it too.

    Args:
        sae: the autoencoder.
        folder: made where it isn't there; files of these names in it are replaced.
        dtype: of the weights in the file; they are used in float32.
        notes: more that the configuration's ``metadata`` is to say.
    """
    tensors = {
        "W_enc": sae.encoder.T,
        "W_dec": sae.decoder,
        "b_dec": sae.decoder_bias,
        "b_gate" if sae.activation == "gated" else "b_enc": sae.bias,
        "threshold": sae.threshold,
        "r_mag": sae.gain,
        "b_mag": sae.offset,
        "W_skip": sae.skip,
    }
    metadata: dict[str, Any] = {
        "sae_lens_version": _WRITES_LIKE,
        "model_name": sae.model,
        "hook_name": None if sae.point is None else sae.point.lens_name,
        "mechanex_version": __version__,
    }
    if sae.target is not None:
        metadata["hook_name_out"] = sae.target.lens_name
    config: dict[str, Any] = {
        "architecture": sae.architecture,
        "d_in": sae.d_in,
        "d_sae": sae.n_features,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": sae.subtract_decoder_bias,
        "normalize_activations": sae.normalization,
        "reshape_activations": "hook_z" if sae.by_head else "none",
        "metadata": {**metadata, **(notes or {})},
    }
    if sae.k is not None:
        config |= {"k": sae.k, "rescale_acts_by_decoder_norm": sae.by_decoder_norm}
    if sae.is_transcoder:
        config["d_out"] = sae.d_out
    stored = {name: t.detach().to("cpu", dtype).contiguous() for name, t in tensors.items() if t is not None}
    with atomic_path(folder / WEIGHTS) as temporary:
        save_file(stored, temporary)
    with atomic_path(folder / CONFIG) as temporary:
        temporary.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
