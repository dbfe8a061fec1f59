"""Clocks of a GPU: what calls take on the device, and what they cost the calling thread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

Call = Callable[[], object]
Row = dict[str, object]


def graph_of(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    """All the calls as one graph; each has run before, so that nothing is compiled inside."""
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
    return graph


def device_seconds(ways: dict[str, Sequence[Call]], rounds: int = 25) -> dict[str, float]:
    """Median seconds on the device of one call of each way."""
    graphs = {name: graph_of(calls) for name, calls in ways.items()}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for n in range(rounds + 3):
        for name, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            if n >= 3:
                times[name].append(start.elapsed_time(end) / 1e3 / len(ways[name]))
    return {name: statistics.median(found) for name, found in times.items()}


def launch_seconds(ways: dict[str, Call], rounds: int = 15, calls: int = 200) -> dict[str, float]:
    """Median seconds that the calling thread spends on one call of each way; the queue never fills."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for n in range(rounds + 2):
        for name, call in ways.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(calls):
                call()
            if n >= 2:
                times[name].append((time.perf_counter() - start) / calls)
    torch.cuda.synchronize()
    return {name: statistics.median(found) for name, found in times.items()}


def call_seconds(ways: dict[str, Call], rounds: int = 7, calls: int = 3) -> dict[str, float]:
    """Median seconds of one call of each way, launches and gaps included; for calls that need no graph to be seen."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for n in range(rounds + 2):
        for name, call in ways.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            for _ in range(calls):
                call()
            end.record()
            end.synchronize()
            if n >= 2:
                times[name].append(start.elapsed_time(end) / 1e3 / calls)
    return {name: statistics.median(found) for name, found in times.items()}
