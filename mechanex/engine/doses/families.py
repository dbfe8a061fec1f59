"""Doses that differ in strength only, and what they are worth at one price: a line through what was tried."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from .dose import Dose
from .swept import Setting

__all__ = ["Family", "apart", "around", "families_of", "worth"]


@dataclass(frozen=True)
class Family:
    """Settings of which one differs from the next in strength only, the weakest first."""

    settings: tuple[Setting, ...]

    @property
    def strengths(self) -> list[float]:
        """Their strengths, all of one sign."""
        return [one.dose.strength for one in self.settings]

    def at(self, strength: float) -> Dose:
        """The family's dose of some strength."""
        return replace(self.settings[0].dose, strength=strength)


def families_of(settings: Iterable[Setting]) -> list[Family]:
    """The settings by family, families in the order in which they first come."""
    found: dict[Dose, list[Setting]] = {}
    for one in settings:
        sign = math.copysign(1.0, one.dose.strength)
        found.setdefault(replace(one.dose, strength=sign), []).append(one)
    return [Family(tuple(sorted(part, key=lambda one: abs(one.dose.strength)))) for part in found.values()]


def worth(
    strengths: Sequence[float], prices: Sequence[float], gains: Sequence[float], price: float
) -> tuple[float, float, bool]:
    """The strength at which a price is reached, the gain there, and whether it is within what was tried.

    Between two strengths logarithms of prices lie on a line over logarithms of strengths, and gains on one over
    strengths. Where all cost less, the strongest counts as it is; where all cost more, the weakest, with a gain that
    shrinks as the price does.

    Args:
        strengths: ascending in size, all of one sign.
        prices, gains: of each.
        price: what is looked for, above 0.
    """
    sizes = [abs(one) for one in strengths]
    sign = math.copysign(1.0, strengths[0])
    if prices[0] > price:
        return strengths[0], gains[0] * min(1.0, price / prices[0]), False
    for i, (cheap, dear) in enumerate(pairwise(prices)):
        if cheap <= price < dear:
            low, high = math.log(sizes[i]), math.log(sizes[i + 1])
            share = math.log(price / max(cheap, 1e-12)) / math.log(dear / max(cheap, 1e-12))
            size = math.exp(low + share * (high - low))
            along = (size - sizes[i]) / (sizes[i + 1] - sizes[i])
            return sign * size, gains[i] + along * (gains[i + 1] - gains[i]), True
    return strengths[-1], gains[-1], True


def around(family: Family, strength: float) -> tuple[Setting, ...]:
    """The two settings of a family that a strength lies between, or the two at the end that it lies beyond."""
    above = sum(abs(one) < abs(strength) for one in family.strengths)
    first = max(0, min(above, len(family.settings) - 1) - 1)
    return family.settings[first : first + 2]


def apart(families: Sequence[Family], n: int, distance: int) -> list[Family]:
    """The first n families that aren't like an earlier one: of its edit, tokens, method and width, at a layer near its.

    Where there are fewer, the first of the others follow.

    Args:
        families: the best first.
        n: how many are wanted.
        distance: layers that are nearer than this are near.
    """

    def alike(one: Family, other: Family) -> bool:
        a, b = one.at(1.0), other.at(1.0)
        return abs(a.layer - b.layer) < distance and replace(a, layer=b.layer) == b

    found: list[Family] = []
    for one in families:
        if not any(alike(one, other) for other in found):
            found.append(one)
    return [*found, *(one for one in families if one not in found)][:n]
