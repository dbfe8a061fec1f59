"""Counts CUDA graphs: how many were captured, and how often one was replayed, whoever does it."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch


class Captures:
    """Counts while it is entered.

    Attributes:
        captured: graphs whose capture began.
        replayed: launches of graphs.
    """

    def __init__(self) -> None:
        self.captured = self.replayed = 0

    def __enter__(self) -> Captures:
        graph: Any = torch.cuda.CUDAGraph
        self._former = {name: graph.__dict__.get(name) for name in ("capture_begin", "replay")}
        begin, replay = graph.capture_begin, graph.replay

        def counted_begin(graph: Any, *args: Any, **kwargs: Any) -> Any:
            self.captured += 1
            return begin(graph, *args, **kwargs)

        def counted_replay(graph: Any) -> Any:
            self.replayed += 1
            return replay(graph)

        graph.capture_begin, graph.replay = counted_begin, counted_replay
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        graph: Any = torch.cuda.CUDAGraph
        for name, former in self._former.items():
            if former is None:
                delattr(graph, name)
            else:
                setattr(graph, name, former)
