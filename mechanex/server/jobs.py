"""Other work on the model than text: vectors, scores and the like, one piece at a time between decoding steps."""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
from collections import deque
from collections.abc import Callable
from threading import Condition
from typing import Any

from ..engine.models.adapter import ModelAdapter

__all__ = ["Jobs"]

_logger = logging.getLogger(__name__)
_Job = tuple["concurrent.futures.Future[Any]", Callable[[ModelAdapter], Any]]


class Jobs:
    """What waits for the model, and what runs on it. Any thread may add; the model's thread does.

    Args:
        changed: is held while the queue changes, and told when something comes.
    """

    def __init__(self, changed: Condition) -> None:
        self._changed = changed
        self._waiting: deque[_Job] = deque()
        self._running: concurrent.futures.Future[Any] | None = None

    def __len__(self) -> int:
        """Pieces of work that wait."""
        return len(self._waiting)

    @property
    def busy(self) -> bool:
        """Whether something waits or runs."""
        return bool(self._waiting) or self._running is not None

    def add(self, fn: Callable[[ModelAdapter], Any]) -> concurrent.futures.Future[Any]:
        """Queues work and gives its future."""
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        with self._changed:
            self._waiting.append((future, fn))
            self._changed.notify()
        return future

    def do_one(self, adapter: ModelAdapter) -> bool:
        """Does the piece that came first; whether there was one that somebody still waits for."""
        with self._changed:
            if not self._waiting:
                return False
            future, fn = self._waiting.popleft()
            if not future.set_running_or_notify_cancel():
                return False
            self._running = future
        try:
            result = fn(adapter)
        except BaseException as error:
            _tell(future.set_exception, error)
        else:
            _tell(future.set_result, result)
        finally:
            self._running = None
        return True

    def give_up_running(self, error: Exception) -> None:
        """Answers what runs with an error; the work itself goes on."""
        running = self._running
        if running is not None:
            with contextlib.suppress(concurrent.futures.InvalidStateError):  # it ended just now
                running.set_exception(error)

    def end_waiting(self, error: Exception) -> None:
        """Answers all that waits with an error."""
        with self._changed:
            waiting, self._waiting = list(self._waiting), deque()
        for future, _ in waiting:
            if future.set_running_or_notify_cancel():
                future.set_exception(error)


def _tell(setting: Callable[[Any], None], end: Any) -> None:
    try:
        setting(end)
    except concurrent.futures.InvalidStateError:  # it was given up when the server's time was over
        _logger.info("work that nobody waits for any more has ended")
