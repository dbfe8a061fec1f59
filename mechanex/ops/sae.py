"""Features of a sparse autoencoder: those of some rows of its encoder, or the k largest of all in one walk.

The encoder may be kept in bfloat16, float16 or int8 with a scale for every feature; arithmetic is in float32, or
float64 where an argument is. ``[T, n_features]`` is stored only by :func:`sae_features`, which is meant for the few
features that somebody watches. There are no gradients. Ways to a backend are those of :mod:`mechanex.ops.ways`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mechanex import backends
from mechanex.backends import eager
from mechanex.errors import ValidationError

from .dtypes import DTYPE_NAMES, DTYPES
from .encoder import FeatureEncoder
from .ways import way

__all__ = ["quantized", "sae_features", "sae_top_features"]

_ENCODERS = (*DTYPES, torch.int8)


def sae_features(
    hidden: Tensor,
    encoder: Tensor,
    bias: Tensor,
    threshold: Tensor | None = None,
    gain: Tensor | None = None,
    offset: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """What each feature says of each row: ``relu(gain·p + offset)`` where ``p + bias > threshold``, else 0.

    ``p`` is the product of the row and the feature's row of the encoder, times ``scale``. Without gain and offset they
    are 1 and the bias: ReLU without a threshold, JumpReLU with one, gated with both. NaN stays NaN.

    Args:
        hidden: activations as the encoder takes them, ``[T, d]`` (or ``[..., d]``), float32, bfloat16, float16 or
            float64.
        encoder: ``[F, d]``, one row a feature, one of these dtypes or int8.
        bias: ``[F]``, floating point, like all that follow.
        threshold: ``[F]``, or None for 0.
        gain, offset: ``[F]`` both, or neither.
        scale: ``[F]``, what int8 rows are multiplied by; None for others.
        backend: a registered backend for this call; None: the one in force (:func:`mechanex.backends.use`).

    Returns:
        ``[T, F]`` (or ``[..., F]``), float32 (float64 where ``hidden`` or ``encoder`` is).

    Raises:
        ValidationError: shapes, dtypes or devices don't fit, or an argument needs a gradient.
        MechanexError: an explicitly chosen backend can't run here.
    """
    more = {"bias": bias, "threshold": threshold, "gain": gain, "offset": offset, "scale": scale}
    _check(hidden, encoder, more)
    if (gain is None) != (offset is None):
        raise ValidationError("gain and offset go together: give both, of a gated autoencoder, or neither")
    flat = hidden if hidden.dim() == 2 else hidden.reshape(-1, hidden.shape[-1])
    features = FeatureEncoder(encoder, bias, scale, threshold, gain, offset)
    by = way((flat, *features))
    if by == "library":
        found: Tensor = torch.ops.mechanex.sae_features(
            flat, encoder, bias, threshold, gain, offset, scale, backend
        )
    elif by == "torch":
        found = eager.sae_features(flat, features)
    else:
        found = backends.kernel("sae_features", backend, flat, features)(flat, features)
    return found if hidden.dim() == 2 else found.view(*hidden.shape[:-1], encoder.shape[0])


def sae_top_features(
    hidden: Tensor,
    encoder: Tensor,
    bias: Tensor,
    k: int,
    norms: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    signed: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The k features that say most of each row, in one walk over the encoder.

    Of ``z = (p + bias) · norms`` the k largest are kept, and those below 0 are 0; ``signed`` keeps the k of largest
    size, with their signs. ``p`` as for :func:`sae_features`. NaN counts as the largest.

    Args:
        hidden, encoder, bias, scale, backend: as for :func:`sae_features`.
        k: how many, from 1 to F.
        norms: ``[F]``, what the results are multiplied by before they are compared; None: 1.
        signed: compare sizes.

    Returns:
        The values ``[T, k]`` (or ``[..., k]``), largest first, float32 (float64 where ``hidden`` or ``encoder`` is),
        and the features that they are of, int64; of equal ones any.

    Raises:
        ValidationError, MechanexError: as there, or k is out of range.
    """
    _check(hidden, encoder, {"bias": bias, "norms": norms, "scale": scale})
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= encoder.shape[0]:
        raise ValidationError(f"k is from 1 to the encoder's {encoder.shape[0]} features; got {k!r}")
    flat = hidden if hidden.dim() == 2 else hidden.reshape(-1, hidden.shape[-1])
    args = (flat, FeatureEncoder(encoder, bias, scale, norms=norms), k, bool(signed))
    by = way((flat, *args[1]))
    if by == "library":
        values, places = torch.ops.mechanex.sae_top_features(
            flat, encoder, bias, k, norms, scale, bool(signed), backend
        )
    elif by == "torch":
        values, places = eager.sae_top_features(*args)
    else:
        values, places = backends.select("sae_top_features", backend, *args).run(*args)
    shape = (*hidden.shape[:-1], k)
    return (values, places) if hidden.dim() == 2 else (values.view(shape), places.view(shape))


@torch.library.custom_op("mechanex::sae_features", mutates_args=())
def _run_features(
    hidden: Tensor,
    encoder: Tensor,
    bias: Tensor,
    threshold: Tensor | None,
    gain: Tensor | None,
    offset: Tensor | None,
    scale: Tensor | None,
    backend: str | None,
) -> Tensor:
    args = (hidden, FeatureEncoder(encoder, bias, scale, threshold, gain, offset))
    return backends.kernel("sae_features", backend, *args)(*args)


@_run_features.register_fake
def _(hidden: Tensor, encoder: Tensor, bias: Tensor, *_: Any) -> Tensor:
    dtype = FeatureEncoder(encoder, bias).dtype_for(hidden)
    return hidden.new_empty(hidden.shape[0], encoder.shape[0], dtype=dtype)


@torch.library.custom_op("mechanex::sae_top_features", mutates_args=())
def _run_top_features(
    hidden: Tensor,
    encoder: Tensor,
    bias: Tensor,
    k: int,
    norms: Tensor | None,
    scale: Tensor | None,
    signed: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    args = (hidden, FeatureEncoder(encoder, bias, scale, norms=norms), k, signed)
    values, places = backends.select("sae_top_features", backend, *args).run(*args)
    return values, places


@_run_top_features.register_fake
def _(hidden: Tensor, encoder: Tensor, bias: Tensor, k: int, *_: Any) -> tuple[Tensor, Tensor]:
    values = hidden.new_empty(hidden.shape[0], k, dtype=FeatureEncoder(encoder, bias).dtype_for(hidden))
    return values, torch.empty_like(values, dtype=torch.int64)


def quantized(encoder: Tensor) -> tuple[Tensor, Tensor]:
    """An encoder in int8: every row divided by a scale of its own, so that its largest number is 127.

    Args:
        encoder: ``[F, d]``, floating point.

    Returns:
        The rows, int8, and their scales ``[F]``, float32.
    """
    if encoder.shape[1] == 0:
        return encoder.to(torch.int8), encoder.new_ones(encoder.shape[0], dtype=torch.float32)
    largest = encoder.float().abs().amax(1)
    scale = torch.where(largest > 0, largest / 127, torch.ones_like(largest))
    return (encoder.float() / scale[:, None]).round().clamp(-127, 127).to(torch.int8), scale


def _check(hidden: Tensor, encoder: Tensor, more: dict[str, Tensor | None]) -> None:
    """Raise :class:`ValidationError` unless the arguments fit; values are not looked at."""
    for name, tensor in {"hidden": hidden, "encoder": encoder, **more}.items():
        if tensor is None and name != "bias":
            continue
        if not isinstance(tensor, Tensor):
            raise ValidationError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.device != hidden.device:
            raise ValidationError(
                f"{name} is on {tensor.device}, hidden on {hidden.device}: move one of them"
            )
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValidationError(
                f"{name} needs a gradient, and this op has none: detach it, call it under torch.no_grad(), or encode "
                "with the autoencoder's own encode"
            )
    if hidden.dtype not in DTYPES or hidden.dim() < 1:
        raise ValidationError(
            f"hidden must be {DTYPE_NAMES} of shape [T, d], got {hidden.dtype} {list(hidden.shape)}"
        )
    if encoder.dtype not in _ENCODERS or encoder.dim() != 2 or encoder.shape[1] != hidden.shape[-1]:
        raise ValidationError(
            f"encoder must be [F, {hidden.shape[-1]}] (hidden's width) of floating numbers or int8, got "
            f"{encoder.dtype} {list(encoder.shape)}"
        )
    for name, tensor in more.items():
        if tensor is not None and (tuple(tensor.shape) != (encoder.shape[0],) or tensor.dtype not in DTYPES):
            raise ValidationError(
                f"{name} must be floating point [{encoder.shape[0]}], one number a feature, got {tensor.dtype} "
                f"{list(tensor.shape)}"
            )
    if (encoder.dtype is torch.int8) != (more["scale"] is not None):
        raise ValidationError(
            "an int8 encoder comes with a scale for every feature, and others without: see quantized"
        )
