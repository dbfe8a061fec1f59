"""The front of effect against price, and how many settings go on from round to round."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["front", "rounds"]

SHARE = 4  # of the settings of a round, one in this many stays


def front(effects: Sequence[float], prices: Sequence[float], among: Sequence[int] | None = None) -> list[int]:
    """The settings that none is better than at the same price or less, by ascending price.

    Args:
        effects, prices: by setting.
        among: numbers of the settings that count; None for all.
    """
    chosen = range(len(effects)) if among is None else among
    found: list[int] = []
    for i in sorted(chosen, key=lambda i: (prices[i], -effects[i])):
        if not found or effects[i] > effects[found[-1]]:
            found.append(i)
    return found


def rounds(n: int, examples: int, finalists: int, most: float) -> list[tuple[int, int]]:
    """The (settings, examples) of each round: fewer settings on more examples, each round about half the last's work.

    Args:
        n: settings of the first round.
        examples: how many there are.
        finalists: when as few are left, no more rounds follow.
        most: settings times examples that all rounds may cost; the first round takes at least one example.
    """
    sizes = [n]
    while sizes[-1] > finalists:
        sizes.append(max(finalists, math.ceil(sizes[-1] / SHARE)))
    sizes = sizes[: max(1, len(sizes) - 1)]
    first = 1
    while first < examples and _work(sizes, 2 * first, examples) <= most:
        first *= 2
    return [(size, min(examples, first * 2**i)) for i, size in enumerate(sizes)]


def _work(sizes: Sequence[int], first: int, examples: int) -> int:
    return sum(size * min(examples, first * 2**i) for i, size in enumerate(sizes))
