"""Other work on the model than text: vectors, scores and the like, one piece at a time between decoding steps."""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ...engine.models.adapter import ModelAdapter
from ...errors import MechanexError

__all__ = ["ModelJob", "ModelJobs"]

_logger = logging.getLogger(__name__)


@dataclass(eq=False)
class ModelJob:
    """A piece of work: ``future`` has its result, and ``gone`` is set when nobody waits for that any more."""

    work: Callable[[ModelAdapter], Any]
    future: concurrent.futures.Future[Any] = field(default_factory=concurrent.futures.Future)
    gone: threading.Event = field(default_factory=threading.Event)


class ModelJobs:
    """What waits for the model, and what runs on it. Any thread may add; the model's thread does.

    Args:
        changed: is held while the queue changes, and told when something comes.
    """

    def __init__(self, changed: threading.Condition) -> None:
        self._changed = changed
        self._waiting: deque[ModelJob] = deque()
        self._running: ModelJob | None = None
        self._closed: Exception | None = None

    def __len__(self) -> int:
        """Pieces of work that wait."""
        return len(self._waiting)

    @property
    def n_wanted(self) -> int:
        """Those of them that somebody waits for."""
        with self._changed:
            return sum(not job.gone.is_set() for job in self._waiting)

    @property
    def busy(self) -> bool:
        """Whether something waits or runs."""
        return bool(self._waiting) or self._running is not None

    @property
    def wanted(self) -> bool:
        """Whether somebody still waits for what runs."""
        return self._running is not None and not self._running.gone.is_set()

    def add(self, work: Callable[[ModelAdapter], Any]) -> ModelJob:
        """Queues work.

        Raises:
            Exception: that which the queue was closed with; nobody would do the work any more.
        """
        job = ModelJob(work)
        with self._changed:
            if self._closed is not None:
                raise self._closed.with_traceback(None)
            self._waiting.append(job)
            self._changed.notify()
        return job

    def do_one(self, adapter: ModelAdapter) -> bool:
        """Does the piece that came first; whether there was one that somebody still waits for."""
        with self._changed:
            if not self._waiting:
                return False
            job = self._waiting.popleft()
            if job.gone.is_set() or not job.future.set_running_or_notify_cancel():
                return False
            self._running = job
        try:
            result = job.work(adapter)
        except BaseException as error:
            _tell(job.future.set_exception, _tellable(error))
        else:
            _tell(job.future.set_result, result)
        finally:
            self._running = None
        return True

    def give_up_running(self, error: Exception) -> None:
        """Answers what runs with an error; the work itself goes on to its next pause."""
        running = self._running
        if running is not None:
            with contextlib.suppress(concurrent.futures.InvalidStateError):  # it ended just now
                running.future.set_exception(error)

    def close(self, error: Exception) -> None:
        """Takes no more, for this reason, and answers all that waits with it."""
        with self._changed:
            self._closed = error
            waiting, self._waiting = list(self._waiting), deque()
        for job in waiting:
            if job.future.set_running_or_notify_cancel():
                job.future.set_exception(error)


def _tellable(error: BaseException) -> Exception:
    """An error that a waiting coroutine can be given: others would end its task, or leave it waiting."""
    if isinstance(error, Exception) and not isinstance(error, StopIteration):
        return error
    told = MechanexError(f"The work ended with {type(error).__name__}; the server's log has more.", 500)
    told.__cause__ = error
    return told


def _tell(setting: Callable[[Any], None], end: Any) -> None:
    try:
        setting(end)
    except concurrent.futures.InvalidStateError:  # it was given up when the server's time was over
        _logger.info("work that nobody waits for any more has ended")
