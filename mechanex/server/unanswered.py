"""Who was promised an answer and has none yet: nobody is forgotten, wherever the request is when things go wrong."""

from __future__ import annotations

import threading
from collections.abc import Iterable

from ..errors import MechanexError
from .request import Generation

__all__ = ["Unanswered"]


class Unanswered:
    """Requests that were taken and have no end yet. Any thread may use it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._there: dict[int, Generation] = {}
        self._closed: MechanexError | None = None

    def take(self, generations: Iterable[Generation]) -> None:
        """Promises answers, to all of them or none.

        Raises:
            MechanexError: that which it was closed with; nobody would answer any more.
        """
        with self._lock:
            if self._closed is not None:
                raise self._closed.with_traceback(None)
            self._there.update((id(one), one) for one in generations)

    def answered(self, generation: Generation) -> None:
        """One of them has its end."""
        with self._lock:
            self._there.pop(id(generation), None)

    def close(self, error: MechanexError) -> list[Generation]:
        """Takes no more, for this reason; returns those that still wait for an end."""
        with self._lock:
            self._closed = error
            left, self._there = list(self._there.values()), {}
        return left
