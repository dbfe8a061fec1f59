"""What is told to whom: nobody who was promised an answer is forgotten, wherever a request is when things go wrong."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Iterable

from ...errors import MechanexError
from ..http.limits import TokenQuota
from ..metrics import Metrics
from .requests import Generation, Result, ServedRow, Step

__all__ = ["Answers"]

_logger = logging.getLogger(__name__)
_News = tuple[Generation, "Step | Result | MechanexError"]


class Answers:
    """The generations that were promised an end, and their news on the way to the event loop.

    Any thread may ``promise``; all else is for the model's thread.

    Args:
        metrics: counts the ends.
        loop: where generations are told their news.
        quota: of which answers take their tokens, or None.
    """

    def __init__(
        self, metrics: Metrics, loop: asyncio.AbstractEventLoop, quota: TokenQuota | None = None
    ) -> None:
        self._metrics, self._loop, self._quota = metrics, loop, quota
        self._lock = threading.Lock()
        self._promised: dict[int, Generation] = {}
        self._closed: MechanexError | None = None
        self._news: list[_News] = []
        self.n_ended = 0

    def promise(self, generations: Iterable[Generation]) -> None:
        """Promises an end to all of them or none.

        Raises:
            MechanexError: that which it was closed with; nobody would answer any more.
        """
        with self._lock:
            if self._closed is not None:
                raise self._closed.with_traceback(None)
            self._promised.update((id(one), one) for one in generations)

    def add(self, row: ServedRow, step: Step) -> None:
        """A step of a row's answer."""
        self._news.append((row.generation, step))

    def catch_up(self, rows: Iterable[ServedRow]) -> None:
        """Adds what readers were not told yet of answers that don't go on now."""
        for row in rows:
            # A token that can't be decoded ends its row with the next one.
            with contextlib.suppress(Exception):
                if row.request.stream and (step := row.news()) is not None:
                    self.add(row, step)

    def end(self, row: ServedRow, end: Result | MechanexError) -> None:
        """The end of a row's answer, behind what its reader was not told yet."""
        if isinstance(end, MechanexError):
            self.catch_up([row])
        row.ended = True
        self.n_ended += 1
        if self._quota is not None:
            self._quota.spend(row.sender, len(row.chosen))
        with self._lock:
            self._promised.pop(id(row.generation), None)
        self._end(row.generation, end)

    def flush(self) -> None:
        """Hands what was added to the event loop, all at once."""
        if not self._news:
            return
        news, self._news = self._news, []
        try:
            self._loop.call_soon_threadsafe(_deliver, news)
        except RuntimeError:  # the loop is closed, and nobody waits any more
            _logger.debug("%d answers had no one to go to", len(news))

    def close(self, error: MechanexError) -> None:
        """Promises no more, for this reason, and ends those that still wait with it."""
        with self._lock:
            self._closed = error
            left, self._promised = list(self._promised.values()), {}
        for generation in left:
            self._end(generation, error)

    def _end(self, generation: Generation, end: Result | MechanexError) -> None:
        reason = end.finish_reason if isinstance(end, Result) else "error"
        self._metrics.answers.labels("cancelled" if generation.cancelled else reason).inc()
        self._news.append((generation, end))


def _deliver(news: list[_News]) -> None:
    for generation, one in news:
        generation.deliver(one)
