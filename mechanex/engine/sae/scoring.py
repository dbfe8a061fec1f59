"""Scores of many behaviors at once: one product for all plain probes, one op for the features of an autoencoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ...ops.sae import sae_features, sae_top_features
from .autoencoder import SparseAutoencoder
from .behavior import Behavior
from .detectors import FeatureDetector

__all__ = ["Scorer"]


class Scorer:
    """The scores of behaviors that are read at one place, as each behavior's own ``scores`` gives them.

    Args:
        behaviors: at least one, all of one width.
        device: where activations are.
        dtype: in which the encoder's rows are kept; None: in bfloat16, which halves what is read, where that holds
            all of their numbers, as of autoencoders that were published in it, else as they are.
    """

    def __init__(
        self,
        behaviors: Sequence[Behavior],
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> None:
        self.behaviors = tuple(behaviors)
        self.thresholds = torch.tensor([b.threshold for b in behaviors], device=device)
        self._n, self._device = len(behaviors), torch.device(device)
        plain = [i for i, b in enumerate(behaviors) if b.detector == "probe"]
        self._probes: tuple[Tensor, Tensor] | None = None
        if plain:
            chosen = [behaviors[i].probe for i in plain]
            self._probes = self._at(plain), torch.stack([p.direction for p in chosen]).to(device)
        self._low = torch.tensor([_ends(b)[0] for b in behaviors], device=device)
        self._span = torch.tensor([_ends(b)[1] - _ends(b)[0] for b in behaviors], device=device)
        self._groups = [
            _Group([(i, behaviors[i].features) for i in places], self._n, self._device, dtype)  # type: ignore[misc]
            for places in _by_autoencoder(behaviors)
        ]

    def __call__(self, x: Tensor) -> Tensor:
        """[T, n_behaviors] float32 scores of activations [T, d]; shapes depend on T alone."""
        x = x.float()
        raw = torch.zeros(x.shape[0], self._n, device=x.device)
        if self._probes is not None:
            raw = raw.index_copy(1, self._probes[0], x @ self._probes[1].T)
        for group in self._groups:
            raw = raw + group(x)
        return (raw - self._low) / self._span

    def _at(self, places: Sequence[int]) -> Tensor:
        return torch.tensor(places, dtype=torch.int64, device=self._device)


def _ends(behavior: Behavior) -> tuple[float, float]:
    found = behavior.decides
    assert hasattr(found, "low") and hasattr(found, "high")
    return found.low, found.high


def _by_autoencoder(behaviors: Sequence[Behavior]) -> list[list[int]]:
    """Those that ask features, together where one encoder's input serves them."""
    groups: dict[object, list[int]] = {}
    for i, behavior in enumerate(behaviors):
        if behavior.detector == "features" and behavior.features is not None:
            sae = behavior.features.sae
            bias = sae.decoder_bias.cpu().numpy().tobytes() if sae.subtract_decoder_bias else b""
            whole = () if sae.elementwise else (id(sae),)
            key = (sae.activation, sae.normalization, bias, *whole)
            groups.setdefault(key, []).append(i)
    return list(groups.values())


class _Group:
    """Behaviors that ask features of one autoencoder.

    Args:
        members: places among all behaviors, with their detectors.
        n: how many behaviors there are.
        device, dtype: as for :class:`Scorer`.
    """

    def __init__(
        self,
        members: Sequence[tuple[int, FeatureDetector]],
        n: int,
        device: torch.device,
        dtype: torch.dtype | None,
    ) -> None:
        first = members[0][1].sae
        self._whole = not first.elementwise
        if self._whole:
            sae = first.to(device)
            self._weights = torch.zeros(sae.n_features, n, device=device)
            for place, found in members:
                self._weights[found.features.to(device), place] = found.weights.to(device)
        else:
            parts = [
                found.narrowed() if len(found.features) < found.sae.n_features else found
                for _, found in members
            ]
            sae = _joined([found.sae.restricted(found.features) for found in parts]).to(device)
            self._weights = torch.zeros(sae.n_features, n, device=device)
            row = 0
            for (place, _), found in zip(members, parts, strict=True):
                self._weights[row : row + len(found.weights), place] = found.weights.to(device)
                row += len(found.weights)
        self._sae = sae
        self._encoder = sae.encoder if dtype is None else sae.encoder.to(dtype)
        if dtype is None and not self._whole:  # a part is this scorer's own; a whole one would be there twice
            half = sae.encoder.bfloat16()
            self._encoder = half if torch.equal(half.to(sae.encoder.dtype), sae.encoder) else sae.encoder
        self._gain = None if sae.gain is None else sae.gain.exp()
        self._norms = sae.decoder_norms if sae.by_decoder_norm else None

    def __call__(self, x: Tensor) -> Tensor:
        sae = self._sae
        inputs = sae.prepare(x).inputs
        if not self._whole:
            said = sae_features(inputs, self._encoder, sae.bias, sae.threshold, self._gain, sae.offset)
            return said.float() @ self._weights
        assert sae.k is not None
        values, places = sae_top_features(
            inputs, self._encoder, sae.bias, sae.k, self._norms, signed=sae.activation == "abstopk"
        )
        return (values[:, :, None] * self._weights[places]).sum(1)


def _joined(parts: Sequence[SparseAutoencoder]) -> SparseAutoencoder:
    """The features of several autoencoders that take the same input as those of one."""
    if len(parts) == 1:
        return parts[0]
    tensors: dict[str, Tensor | None] = {}
    for name in ("encoder", "bias", "decoder", "threshold", "gain", "offset"):
        found = [getattr(part, name) for part in parts]
        tensors[name] = None if found[0] is None else torch.cat(found)
    return replace(parts[0], **tensors)  # type: ignore[arg-type]
