"""Figures with what chance would make of them: the bootstrap over prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy

__all__ = ["Interval", "bootstrap", "mean_of", "ratio_of"]

RESAMPLES = 1000
Statistic = Callable[[numpy.ndarray], float]


@dataclass(frozen=True)
class Interval:
    """A figure and the interval that 95 % of resamples of its prompts fall in (percentile bootstrap)."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


def bootstrap(statistic: Statistic, n: int, *, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """A statistic of n prompts with its interval.

    Args:
        statistic: from numbers of prompts, [m] int, to the figure over those.
        n: how many prompts there are, 1 or more.
        resamples: how often n of them are drawn with replacement.
        seed: of the draws.
    """
    draws = numpy.random.default_rng(seed).integers(0, n, (resamples, n))
    found = numpy.array([statistic(draw) for draw in draws], dtype=float)
    low, high = numpy.nanpercentile(found, [2.5, 97.5]) if not numpy.isnan(found).all() else (numpy.nan,) * 2
    return Interval(float(statistic(numpy.arange(n))), float(low), float(high))


def mean_of(values: Sequence[float]) -> Interval:
    """The mean of one number per prompt."""
    found = numpy.asarray(values, dtype=float)
    return bootstrap(lambda at: float(found[at].mean()), len(found))


def ratio_of(above: Sequence[float], below: Sequence[float], then: Callable[[float], float]) -> Interval:
    """``then`` of the ratio of two sums over prompts, as perplexity is of log-probabilities and tokens."""
    top, bottom = numpy.asarray(above, dtype=float), numpy.asarray(below, dtype=float)
    return bootstrap(
        lambda at: then(float(top[at].sum() / bottom[at].sum())) if bottom[at].sum() else float("nan"),
        len(top),
    )
