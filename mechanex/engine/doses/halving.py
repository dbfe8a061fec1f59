"""Which settings stay for the next, costlier round: those on the front of effect against price."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["front", "rounds", "spread", "survivors"]

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


def survivors(effects: Sequence[float], prices: Sequence[float], n: int, most: float = math.inf) -> list[int]:
    """The n best settings: the front, then the front of what is left, and so on; in their own order.

    Args:
        effects, prices: by setting.
        n: how many stay.
        most: settings of a higher price come last.
    """
    kept: list[int] = []
    dear = [i for i in range(len(effects)) if not prices[i] <= most]
    left = set(range(len(effects))) - set(dear)
    while left and len(kept) < n:
        found = front(effects, prices, sorted(left))
        kept += found if len(kept) + len(found) <= n else spread(found, n - len(kept))
        left -= set(found)
    dear.sort(key=prices.__getitem__)
    return sorted(kept + dear[: n - len(kept)])


def spread(ordered: Sequence[int], n: int) -> list[int]:
    """n of a front, evenly over it, its ends among them; the dearer end where n is 1."""
    if n >= len(ordered):
        return list(ordered)
    if n == 1:
        return [ordered[-1]]
    return [ordered[round(i * (len(ordered) - 1) / (n - 1))] for i in range(n)]


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
