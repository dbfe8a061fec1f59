"""Fair ratios on a noisy machine: the ways take turns, and medians are compared."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any


def medians(ways: Mapping[str, Callable[[], Any]], rounds: int, *, settled: bool = False) -> dict[str, float]:
    """Median seconds of each way; every round runs each of them once, after one round that is not counted.

    Args:
        ways: what to run, by name.
        rounds: how many rounds count.
        settled: run each way once more, unmeasured, right before it is timed: for calls so short that the caches and
            free memory that another way leaves behind would be what is timed.
    """
    times: dict[str, list[float]] = {name: [] for name in ways}
    for n in range(rounds + 1):
        for name, run in ways.items():
            if settled:
                run()
            start = time.perf_counter()
            run()
            if n:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(found) for name, found in times.items()}
