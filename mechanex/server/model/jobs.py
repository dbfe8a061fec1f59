"""Other work on the model than text: vectors, scores and the like, one piece at a time between decoding steps."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from typing import Any

from ...engine.models.adapter import ModelAdapter
from ...errors import MechanexError

__all__ = ["ModelJobs"]

_Work = Callable[[ModelAdapter], Any]


class ModelJobs:
    """What waits for the model, and what runs on it. Any thread may add; the model's thread does.

    Who doesn't wait for a piece of work any more cancels its future, also while it runs.

    Args:
        changed: is held while the queue changes, and told when something comes.
    """

    def __init__(self, changed: threading.Condition) -> None:
        self._changed = changed
        self._waiting: deque[tuple[_Work, Future[Any]]] = deque()
        self._running: Future[Any] | None = None
        self._closed: Exception | None = None

    def __len__(self) -> int:
        """Pieces of work that wait."""
        return len(self._waiting)

    @property
    def n_wanted(self) -> int:
        """Those of them that somebody waits for."""
        with self._changed:
            return sum(not future.cancelled() for _, future in self._waiting)

    @property
    def busy(self) -> bool:
        """Whether something waits or runs."""
        return bool(self._waiting) or self._running is not None

    @property
    def wanted(self) -> bool:
        """Whether somebody still waits for what runs."""
        running = self._running
        return running is not None and not running.done()

    def add(self, work: _Work) -> Future[Any]:
        """Queues work; the future has its result.

        Raises:
            Exception: that which the queue was closed with; nobody would do the work any more.
        """
        future: Future[Any] = Future()
        with self._changed:
            if self._closed is not None:
                raise self._closed.with_traceback(None)
            self._waiting.append((work, future))
            self._changed.notify()
        return future

    def do_one(self, adapter: ModelAdapter) -> bool:
        """Does the piece that came first; whether there was one that somebody still waits for."""
        with self._changed:
            if not self._waiting:
                return False
            work, future = self._waiting.popleft()
            if future.cancelled():
                return False
            self._running = future
        try:
            result = work(adapter)
        except BaseException as error:
            _tell(future.set_exception, _tellable(error))
        else:
            _tell(future.set_result, result)
        finally:
            self._running = None
        return True

    def give_up_running(self, error: Exception) -> None:
        """Answers what runs with an error; the work itself goes on to its next pause."""
        running = self._running
        if running is not None:
            _tell(running.set_exception, error)

    def close(self, error: Exception) -> None:
        """Takes no more, for this reason, and answers all that waits with it."""
        with self._changed:
            self._closed = error
            waiting, self._waiting = list(self._waiting), deque()
        for _, future in waiting:
            _tell(future.set_exception, error)


def _tell(setting: Callable[[Any], None], end: Any) -> None:
    with contextlib.suppress(InvalidStateError):  # it has ended, or nobody waits for it
        setting(end)


def _tellable(error: BaseException) -> Exception:
    """An error that a waiting coroutine can be given: others would end its task, or leave it waiting."""
    if isinstance(error, Exception) and not isinstance(error, StopIteration):
        return error
    told = MechanexError(f"The work ended with {type(error).__name__}; the server's log has more.", 500)
    told.__cause__ = error
    return told
