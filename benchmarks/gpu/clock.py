"""Clocks of a GPU: what calls take on the device, and what they cost the calling thread.

Without a GPU everything is timed by the host's clock, which tells nothing but that the calls run.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

Call = Callable[[], object]


def _in_turn(runs: dict[str, Call], rounds: int, warm: int = 2) -> dict[str, float]:
    """Median seconds on the device of each, the ways taking turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for n in range(rounds + warm):
        for name, run in runs.items():
            seconds = _seconds(run)
            if n >= warm:
                times[name].append(seconds)
    return {name: statistics.median(found) for name, found in times.items()}


def _seconds(run: Call) -> float:
    if not torch.cuda.is_available():
        begun = time.perf_counter()
        run()
        return time.perf_counter() - begun
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _all(calls: Sequence[Call]) -> Call:
    def run() -> None:
        for call in calls:
            call()

    return run


def graph_of(calls: Sequence[Call]) -> Call:
    """Runs all the calls as one graph; each has run before, so that nothing is compiled inside."""
    if not torch.cuda.is_available():
        return _all(calls)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def device_seconds(ways: dict[str, Sequence[Call]], rounds: int = 25) -> dict[str, float]:
    """Median seconds on the device of one call of each way, in a graph of all of them."""
    found = _in_turn({name: graph_of(calls) for name, calls in ways.items()}, rounds, 3)
    return {name: seconds / len(ways[name]) for name, seconds in found.items()}


def call_seconds(ways: dict[str, Call], rounds: int = 7, calls: int = 3) -> dict[str, float]:
    """Median seconds of one call of each way, one after another: the longer of its launch and its work."""
    found = _in_turn({name: _all([call] * calls) for name, call in ways.items()}, rounds)
    return {name: seconds / calls for name, seconds in found.items()}


def launch_seconds(ways: dict[str, Call], rounds: int = 15, calls: int = 200) -> dict[str, float]:
    """Median seconds that the calling thread spends on one call of each way; the queue never fills."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for n in range(rounds + 2):
        for name, call in ways.items():
            synchronize()
            start = time.perf_counter()
            for _ in range(calls):
                call()
            if n >= 2:
                times[name].append((time.perf_counter() - start) / calls)
    synchronize()
    return {name: statistics.median(found) for name, found in times.items()}


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
