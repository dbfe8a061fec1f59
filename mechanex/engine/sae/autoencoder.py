"""A sparse autoencoder as a value: its weights, what happens to an activation before them, and its features."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ...errors import ValidationError
from .hook_points import HookPoint

__all__ = ["Activation", "Normalization", "Prepared", "SparseAutoencoder"]

Activation = Literal["relu", "jumprelu", "gated", "topk", "abstopk"]
Normalization = Literal["none", "layer_norm", "constant_norm_rescale"]

_BY_FEATURE = ("encoder", "bias", "decoder", "threshold", "gain", "offset")
_EPS = 1e-5  # added to a standard deviation by which activations are divided


class Prepared(NamedTuple):
    """An activation as the encoder takes it, and what brings a reconstruction back.

    Args:
        inputs: ``[..., d_in]``.
        center, size: ``[..., 1]`` or None: a reconstruction is multiplied by ``size``, then ``center`` is added.
    """

    inputs: Tensor
    center: Tensor | None
    size: Tensor | None


@dataclass(frozen=True, eq=False)
class SparseAutoencoder:
    """Features of a model's activations, and the activations that features stand for.

    Args:
        encoder: ``[n_features, d_in]``, one row a feature.
        bias: ``[n_features]``; of a gated one, the gates'.
        decoder: ``[n_features, d_out]``.
        decoder_bias: ``[d_out]``.
        activation: what makes features of the products: ``"relu"``; ``"jumprelu"``: itself above ``threshold``;
            ``"gated"``: ``relu(exp(gain) · product + offset)`` where the product and bias are above 0; ``"topk"``: the
            ``k`` largest, not below 0; ``"abstopk"``: the ``k`` of largest size, with their signs.
        threshold: ``[n_features]``, of JumpReLU.
        gain, offset: ``[n_features]``, of gates.
        k: how many features a token has, of top-k.
        by_decoder_norm: whether top-k chooses by the product times the feature's norm in the decoder, which then is
            what the feature says too (SAELens' ``rescale_acts_by_decoder_norm``).
        subtract_decoder_bias: whether ``decoder_bias`` is taken off the activations before they are encoded.
        normalization: ``"layer_norm"`` (over the width, unbiased deviation plus 1e-5) and ``"constant_norm_rescale"``
            (to the norm √d) are undone after decoding.
        skip: ``[d_out, d_in]``, of skip transcoders: the activations times it are added to the reconstruction.
        point: where its activations are read; None where that isn't known.
        target: where a transcoder's reconstruction belongs; None: at ``point``.
        by_head: whether activations come as ``[..., heads, d_head]``.
        model: the model that it was made for, as its file says.
        architecture: what its file calls it.
        source: where it was read from.
        notes: what else its file says, for people.
    """

    encoder: Tensor
    bias: Tensor
    decoder: Tensor
    decoder_bias: Tensor
    activation: Activation = "relu"
    threshold: Tensor | None = None
    gain: Tensor | None = None
    offset: Tensor | None = None
    k: int | None = None
    by_decoder_norm: bool = False
    subtract_decoder_bias: bool = False
    normalization: Normalization = "none"
    skip: Tensor | None = None
    point: HookPoint | None = None
    target: HookPoint | None = None
    by_head: bool = False
    model: str | None = None
    architecture: str = "standard"
    source: str = ""
    notes: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.encoder.dim() != 2 or self.decoder.dim() != 2:
            raise ValidationError(
                f"an autoencoder's matrices have two dimensions; got {list(self.encoder.shape)} and "
                f"{list(self.decoder.shape)}."
            )
        n, d_in, d_out = self.encoder.shape[0], self.encoder.shape[1], self.decoder.shape[1]
        wanted = {
            "decoder": (n, d_out),
            "bias": (n,),
            "decoder_bias": (d_out,),
            "threshold": (n,),
            "gain": (n,),
            "offset": (n,),
            "skip": (d_out, d_in),
        }
        for name, shape in wanted.items():
            tensor = getattr(self, name)
            if tensor is not None and tuple(tensor.shape) != shape:
                raise ValidationError(
                    f"{name} has shape {list(tensor.shape)}, and with an encoder of {n} features of width {d_in} "
                    f"it is {list(shape)}."
                )
        if n == 0 or d_in == 0 or d_out == 0:
            raise ValidationError(f"an autoencoder has features and a width; got {list(self.encoder.shape)}.")
        for name in ("encoder", "decoder", *wanted):
            tensor = getattr(self, name)
            if tensor is not None and not bool(torch.isfinite(tensor).all()):
                raise ValidationError(f"{name} holds NaN or infinite numbers.")
        needs = {"jumprelu": ("threshold",), "gated": ("gain", "offset"), "topk": ("k",), "abstopk": ("k",)}
        lacks = [name for name in needs.get(self.activation, ()) if getattr(self, name) is None]
        if lacks:
            raise ValidationError(f"a {self.activation} autoencoder needs {' and '.join(lacks)}.")
        if self.k is not None and not 1 <= self.k <= n:
            raise ValidationError(f"k is from 1 to the {n} features; got {self.k}.")
        if self.subtract_decoder_bias and d_in != d_out:
            raise ValidationError(
                f"the decoder's bias is {d_out} wide and can't be taken off activations of width {d_in}."
            )

    @property
    def n_features(self) -> int:
        """How many features it has."""
        return self.encoder.shape[0]

    @property
    def d_in(self) -> int:
        """Width of the activations that it reads."""
        return self.encoder.shape[1]

    @property
    def d_out(self) -> int:
        """Width of its reconstructions."""
        return self.decoder.shape[1]

    @property
    def elementwise(self) -> bool:
        """Whether a feature depends on its own row of the encoder alone: all but top-k."""
        return self.activation not in ("topk", "abstopk")

    @property
    def decoder_norms(self) -> Tensor:
        """``[n_features]`` norms of the features' directions."""
        norms: Tensor = self.decoder.norm(dim=1)
        return norms

    def prepare(self, activations: Tensor) -> Prepared:
        """Activations as the encoder takes them.

        Args:
            activations: ``[..., d_in]`` (``[..., heads, d_head]`` with ``by_head``), any floating dtype.
        """
        x = activations.to(self.encoder.device, self.encoder.dtype)
        if self.by_head and x.shape[-1] != self.d_in:
            x = x.flatten(-2)
        if x.shape[-1] != self.d_in:
            raise ValidationError(
                f"the activations are {x.shape[-1]} wide and the autoencoder reads {self.d_in}: it was made for "
                f"{self.model or 'another model'}{f' at {self.point}' if self.point else ''}."
            )
        center = size = None
        if self.normalization == "layer_norm":
            center = x.mean(-1, keepdim=True)
            x = x - center
            size = x.std(-1, keepdim=True)
            x = x / (size + _EPS)
        elif self.normalization == "constant_norm_rescale":
            factor = self.d_in**0.5 / x.norm(dim=-1, keepdim=True)
            x, size = x * factor, 1 / factor
        if self.subtract_decoder_bias:
            x = x - self.decoder_bias
        return Prepared(x, center, size)

    def encode(self, activations: Tensor) -> Tensor:
        """``[..., n_features]`` features of activations ``[..., d_in]``, in the autoencoder's dtype."""
        return self.features_of(self.prepare(activations).inputs)

    def features_of(self, inputs: Tensor) -> Tensor:
        """As ``encode``, of activations that are prepared already."""
        products = inputs @ self.encoder.T
        if self.activation == "gated":
            assert self.gain is not None and self.offset is not None
            open_gates = (products + self.bias > 0).to(products.dtype)
            return open_gates * (products * self.gain.exp() + self.offset).relu()
        z = products + self.bias
        if self.activation == "jumprelu":
            assert self.threshold is not None
            return z.relu() * (z > self.threshold).to(z.dtype)
        if self.activation == "relu":
            return z.relu()
        assert self.k is not None
        if self.by_decoder_norm:
            z = z * self.decoder_norms
        signed = self.activation == "abstopk"
        places = (z.abs() if signed else z).topk(self.k, dim=-1).indices
        kept = z.gather(-1, places)
        return torch.zeros_like(z).scatter_(-1, places, kept if signed else kept.relu())

    def decode(self, features: Tensor, prepared: Prepared | None = None) -> Tensor:
        """``[..., d_out]`` what features stand for (a skip connection is no part of it).

        Args:
            features: ``[..., n_features]``.
            prepared: of the activations that the features are of, where the autoencoder normalises them; a
                transcoder's output is not normalised.

        Raises:
            ValidationError: it normalises, and ``prepared`` is missing.
        """
        if self.by_decoder_norm:
            # A direction of zero says nothing, and must not make the rest NaN.
            features = features / self.decoder_norms.clamp_min(torch.finfo(features.dtype).tiny)
        x = features @ self.decoder + self.decoder_bias
        if self.normalization != "none" and not self.is_transcoder:
            if prepared is None or prepared.size is None:
                raise ValidationError(
                    f"this autoencoder undoes its {self.normalization}: give decode what prepare returned."
                )
            x = x * prepared.size
            x = x if prepared.center is None else x + prepared.center
        return x

    @property
    def is_transcoder(self) -> bool:
        """Whether it gives other activations than it reads."""
        return "transcoder" in self.architecture

    def reconstruct(self, activations: Tensor) -> Tensor:
        """``[..., d_out]`` what the autoencoder makes of activations, in its dtype, in their shape."""
        prepared = self.prepare(activations)
        x = self.decode(self.features_of(prepared.inputs), prepared)
        if self.skip is not None:
            x = x + activations.to(self.skip.device, self.skip.dtype) @ self.skip.T
        if self.by_head and activations.shape[-1] != self.d_in:
            x = x.reshape(*x.shape[:-1], *activations.shape[-2:])
        return x

    def restricted(self, features: Sequence[int] | Tensor) -> SparseAutoencoder:
        """The same for some of its features alone, which say exactly what they say in the whole.

        Raises:
            ValidationError: a top-k autoencoder, whose features depend on all others, or a feature that isn't there.
        """
        if not self.elementwise:
            raise ValidationError(
                "a feature of a top-k autoencoder depends on all others: it can't be asked alone."
            )
        places = torch.as_tensor(features, dtype=torch.int64, device=self.encoder.device)
        if places.numel() == 0 or bool(((places < 0) | (places >= self.n_features)).any()):
            raise ValidationError(
                f"features are numbered 0 to {self.n_features - 1}; got {places.tolist()[:8]}."
            )
        return self._changed(lambda tensor: tensor[places], _BY_FEATURE)

    def to(self, target: torch.device | torch.dtype | str) -> SparseAutoencoder:
        """The same autoencoder on another device or in another floating dtype."""
        return self._changed(lambda tensor: tensor.to(target), (*_BY_FEATURE, "decoder_bias", "skip"))

    def _changed(self, change: Callable[[Tensor], Tensor], names: Sequence[str]) -> SparseAutoencoder:
        changed: dict[str, Any] = {}
        for name in names:
            tensor = getattr(self, name)
            changed[name] = None if tensor is None else change(tensor)
        same = all(changed[name] is getattr(self, name) for name in names)
        return self if same else replace(self, **changed)

    def __repr__(self) -> str:
        made = f", {self.model}" if self.model else ""
        at = f" at {self.point}" if self.point else ""
        return f"SparseAutoencoder({self.architecture}, {self.n_features} features of width {self.d_in}{at}{made})"
