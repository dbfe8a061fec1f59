"""Scores of many behaviors at once: one product for all plain probes, one op for the features of an autoencoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...ops.sae import sae_features, sae_top_features
from .behavior import Behavior
from .detectors import FeatureDetector, ProbeDetector

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
        self._parts: list[_Probes | _Chosen | _Top] = []
        places: list[int] = []
        if plain := [i for i, b in enumerate(behaviors) if b.detector == "probe"]:
            self._parts.append(_Probes([behaviors[i].probe for i in plain], device))
            places += plain
        for members in _by_autoencoder(behaviors):
            detectors = [found for i in members if (found := behaviors[i].features) is not None]
            kind = _Chosen if detectors[0].sae.elementwise else _Top
            self._parts.append(kind(detectors, device, dtype))
            places += members
        # Which of the parts' columns each behavior's is.
        in_order = places == sorted(places)
        self._order = None if in_order else torch.tensor(places, device=device).argsort()
        ends = [(b.features if b.detector == "features" and b.features else b.probe) for b in behaviors]
        self._least = torch.tensor([-one.low / (one.high - one.low) for one in ends], device=device)

    def __call__(self, x: Tensor) -> Tensor:
        """[T, n_behaviors] float32 scores of activations [T, d]; shapes depend on T alone."""
        x = x.float()
        sums = [part(x) for part in self._parts]
        found = sums[0] if len(sums) == 1 else torch.cat(sums, 1)
        if self._order is not None:
            found = found.index_select(1, self._order)
        return found + self._least


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


class _Probes:
    """The components of activations along the directions of probes, their span being 1."""

    def __init__(self, probes: Sequence[ProbeDetector], device: torch.device | str) -> None:
        self._directions = torch.stack([one.direction / (one.high - one.low) for one in probes]).to(device)

    def __call__(self, x: Tensor) -> Tensor:
        return x @ self._directions.T


class _Chosen:
    """Weighted sums of some features each, their span being 1, of autoencoders that take the same input.

    Args:
        detectors: whose features; sums of fewer than others have are filled up with their first at weight 0.
        device, dtype: as for :class:`Scorer`.
    """

    def __init__(
        self, detectors: Sequence[FeatureDetector], device: torch.device | str, dtype: torch.dtype | None
    ) -> None:
        most = max(len(found.features) for found in detectors)
        self._sae = detectors[0].narrowed().sae.to(device)
        self._weights = torch.zeros(len(detectors), most, device=device)
        rows: list[Tensor] = []
        for weights, found in zip(self._weights, detectors, strict=True):
            count = len(found.features)
            weights[:count] = found.weights / (found.high - found.low)
            rows.append(torch.cat([found.features, found.features[:1].expand(most - count)]))

        def of_rows(name: str) -> Tensor | None:
            if getattr(self._sae, name) is None:
                return None
            return torch.cat([getattr(d.sae, name)[i] for d, i in zip(detectors, rows, strict=True)]).to(
                device
            )

        encoder = of_rows("encoder")
        assert encoder is not None
        narrow = encoder.to(torch.bfloat16 if dtype is None else dtype)
        exact = dtype is not None or torch.equal(narrow.to(encoder.dtype), encoder)
        self._encoder = narrow if exact else encoder
        self._bias, self._threshold, gain, self._offset = map(
            of_rows, ("bias", "threshold", "gain", "offset")
        )
        self._gain = None if gain is None else gain.exp()

    def __call__(self, x: Tensor) -> Tensor:
        assert self._bias is not None
        inputs = self._sae.prepare(x).inputs
        said = sae_features(inputs, self._encoder, self._bias, self._threshold, self._gain, self._offset)
        return (said.float().view(-1, *self._weights.shape) * self._weights).sum(2)


class _Top:
    """Weighted sums of some features each, their span being 1, of one top-k autoencoder.

    Args:
        detectors: whose features.
        device: as for :class:`Scorer`.
        dtype: likewise; None: as it is, which a copy would add to.
    """

    def __init__(
        self, detectors: Sequence[FeatureDetector], device: torch.device | str, dtype: torch.dtype | None
    ) -> None:
        self._sae = sae = detectors[0].sae.to(device)
        self._encoder = sae.encoder if dtype is None else sae.encoder.to(dtype)
        self._norms = sae.decoder_norms if sae.by_decoder_norm else None
        self._weights = torch.zeros(sae.n_features, len(detectors), device=device)
        for i, found in enumerate(detectors):
            self._weights[found.features.to(device), i] = (found.weights / (found.high - found.low)).to(
                device
            )

    def __call__(self, x: Tensor) -> Tensor:
        sae = self._sae
        assert sae.k is not None
        values, places = sae_top_features(
            sae.prepare(x).inputs,
            self._encoder,
            sae.bias,
            sae.k,
            self._norms,
            signed=sae.activation == "abstopk",
        )
        return (values[:, :, None] * self._weights[places]).sum(1)
