"""What tells a behavior from an activation: features of an autoencoder, or the difference of two means; how well."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from ...errors import ValidationError
from ...ops.sae import sae_features, sae_top_features
from ..pauses import pause
from .autoencoder import SparseAutoencoder

__all__ = ["Detector", "FeatureDetector", "ProbeDetector", "auroc", "fit_features", "fit_probe"]


class Detector(Protocol):
    """A score of activations, 0 for what negative examples have on average and 1 for what positive ones have."""

    def scores(self, x: Tensor) -> Tensor:
        """[T] float32 scores of activations [T, d]."""
        ...


@dataclass(frozen=True, eq=False)
class ProbeDetector:
    """The component along a direction: the plain difference of means, which is there beside every other detector.

    Args:
        direction: [d], of norm 1.
        low, high: the component in negative and in positive examples, on average over tokens.
    """

    direction: Tensor
    low: float
    high: float

    def scores(self, x: Tensor) -> Tensor:
        """[T] float32 scores of activations [T, d]."""
        return (x.float() @ self.direction.to(x.device) - self.low) / (self.high - self.low)


@dataclass(frozen=True, eq=False)
class FeatureDetector:
    """A weighted sum of features.

    Args:
        sae: the autoencoder; of one that isn't top-k the features' part alone will do.
        features: [n] int64, which of ``sae``'s features.
        weights: [n].
        low, high: the sum in negative and in positive examples, on average over tokens.
        levels: [n] what each feature says in negative examples, on average over tokens.
        numbers: [n] the features' numbers in the whole autoencoder, where ``sae`` is a part; None: ``features``.
    """

    sae: SparseAutoencoder
    features: Tensor
    weights: Tensor
    low: float
    high: float
    levels: Tensor
    numbers: Tensor | None = None

    @property
    def names(self) -> list[int]:
        """The features' numbers in the whole autoencoder."""
        return (self.features if self.numbers is None else self.numbers).tolist()

    def values(self, x: Tensor) -> Tensor:
        """[T, n] what the features say of activations [T, d], exactly as the whole autoencoder does."""
        sae = self.sae
        inputs = sae.prepare(x).inputs
        if sae.elementwise:
            part = sae if len(self.features) == sae.n_features else sae.restricted(self.features)
            gain = None if part.gain is None else part.gain.exp()
            return sae_features(inputs, part.encoder, part.bias, part.threshold, gain, part.offset)
        assert sae.k is not None
        norms = sae.decoder_norms if sae.by_decoder_norm else None
        values, places = sae_top_features(
            inputs, sae.encoder, sae.bias, sae.k, norms, signed=sae.activation == "abstopk"
        )
        asked = self.features.to(places.device)
        return (values[:, :, None] * (places[:, :, None] == asked)).sum(1)

    def scores(self, x: Tensor) -> Tensor:
        """[T] float32 scores of activations [T, d]."""
        said = self.values(x).float() @ self.weights.to(x.device)
        return (said - self.low) / (self.high - self.low)

    def narrowed(self) -> FeatureDetector:
        """The same with the part of the autoencoder that it needs: all of a top-k one."""
        if not self.sae.elementwise or len(self.features) == self.sae.n_features:
            return self
        return replace(
            self,
            sae=self.sae.restricted(self.features),
            features=torch.arange(len(self.features)),
            numbers=self.features,
        )


def fit_probe(x: Tensor, answer: Tensor, positive: Tensor) -> ProbeDetector:
    """The difference of the answers' means.

    Args:
        x: [N, d] activations of the answers' tokens.
        answer: [N] which answer each is of.
        positive: [n_answers] bool.

    Raises:
        ValidationError: the means are the same.
    """
    means = _answer_means(x, answer, len(positive))
    difference = means[positive].mean(0) - means[~positive].mean(0)
    size = float(difference.norm())
    if not math.isfinite(size) or size <= 1e-6 * float(means.norm(dim=1).mean()):
        raise ValidationError(
            "the positive and the negative answers have the same activations, or some that aren't finite: check the "
            "examples and the model."
        )
    direction = (difference / size).float()
    along = means @ direction.double()
    return ProbeDetector(direction, float(along[~positive].mean()), float(along[positive].mean()))


def fit_features(
    sae: SparseAutoencoder, x: Tensor, answer: Tensor, positive: Tensor, most: int = 16
) -> FeatureDetector | None:
    """The features whose answers' means differ most, each weighed by its difference over its variance.

    Args:
        sae: the autoencoder.
        x, answer, positive: as for ``fit_probe``.
        most: how many features.

    Returns:
        None where no feature differs.
    """
    n = len(positive)
    sums = torch.zeros(n, sae.n_features, dtype=torch.float64)
    for first in range(0, len(x), 1024):
        pause()
        part = slice(first, first + 1024)
        sums.index_add_(0, answer[part], sae.encode(x[part]).double().cpu())
    means = sums / _sizes(answer, n)[:, None]
    high, low = means[positive], means[~positive]
    difference = high.mean(0) - low.mean(0)
    variance = (high.var(0, correction=0) + low.var(0, correction=0)) / 2
    active = (means != 0).any(0)
    if not bool(active.any()) or float(difference.abs().max()) == 0:
        return None
    # A feature that hardly ever speaks has a variance near 0 by chance alone.
    variance = variance + variance[active].mean()
    found = (difference.abs() / variance.sqrt()).topk(min(most, int((difference != 0).sum()))).indices
    found = found.sort().values
    weights = (difference / variance)[found].float()
    said = means[:, found] @ weights.double()
    ends = float(said[~positive].mean()), float(said[positive].mean())
    if ends[1] <= ends[0]:
        return None
    return FeatureDetector(sae, found, weights, *ends, low[:, found].mean(0).float())


def _sizes(answer: Tensor, n: int) -> Tensor:
    return torch.bincount(answer, minlength=n).double().clamp_min(1)


def _answer_means(x: Tensor, answer: Tensor, n: int) -> Tensor:
    sums = torch.zeros(n, x.shape[1], dtype=torch.float64)
    return sums.index_add_(0, answer, x.double()) / _sizes(answer, n)[:, None]


def auroc(positive: Sequence[float], negative: Sequence[float]) -> tuple[float, float, float]:
    """How often a positive score is above a negative one, ties counting half, with a 95 % interval.

    The interval is Hanley and McNeil's (1982).
    """
    high, low = (
        torch.tensor(list(positive), dtype=torch.float64),
        torch.tensor(list(negative), dtype=torch.float64),
    )
    above = (high[:, None] > low).double() + 0.5 * (high[:, None] == low).double()
    a = float(above.mean())
    q1, q2 = a / (2 - a), 2 * a * a / (1 + a)
    n, m = len(high), len(low)
    variance = (a * (1 - a) + (n - 1) * (q1 - a * a) + (m - 1) * (q2 - a * a)) / (n * m)
    # Of a few answers that all separate, the formula would be sure: one pair more could have failed.
    half = max(1.96 * math.sqrt(max(variance, 0.0)), 1.0 / (n + m + 1))
    return a, max(0.0, a - half), min(1.0, a + half)
