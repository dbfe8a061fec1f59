"""Where a score becomes a detection: thresholds for a wanted rate of false alarms, and rates with their intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["ANSWER_TOKENS", "Rate", "calibrated", "per_answer", "share", "widened"]

ANSWER_TOKENS = 64
"""False alarms are counted for an answer of so many tokens."""
_MISSED = 0.05  # share of answers whose highest scores needn't leave room above the threshold
_TAIL = 0.1  # share of the largest scores whose excess is fitted


@dataclass(frozen=True)
class Rate:
    """A rate with its 95 % interval.

    Args:
        rate: as counted.
        low, high: its interval.
        count: of what the rate is, such as detections.
        of: in how many.
    """

    rate: float
    low: float
    high: float
    count: int
    of: float


def calibrated(scores: Tensor, rate: float) -> float:
    """The score that tokens without the behavior exceed so rarely that a false alarm comes at this rate.

    A few hundred tokens don't hold the one in thousands that is asked for, so the largest scores are continued by an
    exponential, whose mean is that of their excess over the score that one token in ten exceeds. Tokens of an answer
    are alike, and count as if they weren't: what is promised is rather too few alarms than too many.

    Args:
        scores: [N] of tokens of answers without the behavior, held out from what made the detector.
        rate: false alarms per answer of ``ANSWER_TOKENS`` tokens, in (0, 1).
    """
    per_token = 1 - (1 - rate) ** (1 / ANSWER_TOKENS)
    ordered = scores.double().sort().values
    n = len(ordered)
    start = float(ordered[min(n - 1, int((1 - _TAIL) * n))])
    excess = ordered[ordered > start] - start
    mean = float(excess.mean()) if len(excess) else 0.0
    found = start + mean * math.log(max(_TAIL / per_token, 1.0))
    if n * per_token >= 1:  # enough tokens to read it off
        found = float(ordered[min(n - 1, math.ceil((1 - per_token) * n) - 1)])
    return found


def widened(threshold: float, positive: Sequence[Tensor]) -> float:
    """A higher threshold where answers with the behavior leave room for it, halfway to what nearly all of them exceed.

    Texts that are met later differ more from the behavior's examples than these do from each other, and alarms among
    them cost; a detection that is far above the threshold does not need it to be low.

    Args:
        threshold: the least that it is to be.
        positive: scores of the tokens of each answer with the behavior.
    """
    highest = torch.stack([one.max() for one in positive]).double()
    nearly_all = float(highest.quantile(_MISSED))
    return threshold if nearly_all <= threshold else (threshold + nearly_all) / 2


def per_answer(scores: Sequence[Tensor], threshold: float) -> Rate:
    """False alarms per answer of ``ANSWER_TOKENS`` tokens, each answer alarming once at most; Byar's interval."""
    flagged = sum(bool((one > threshold).any()) for one in scores)
    answers = max(sum(map(len, scores)) / ANSWER_TOKENS, 1e-9)

    def bound(count: int, sign: float) -> float:
        if count == 0:
            return 0.0
        return count * (1 - 1 / (9 * count) + sign * 1.96 / (3 * math.sqrt(count))) ** 3

    low, high = bound(flagged, -1) / answers, bound(flagged + 1, 1) / answers
    return Rate(flagged / answers, low, high, flagged, round(answers, 2))


def share(hits: Sequence[bool]) -> Rate:
    """A share with Wilson's interval."""
    n, count, z = len(hits), sum(hits), 1.96
    p = count / n
    center = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return Rate(p, max(0.0, center - half), min(1.0, center + half), count, n)
