"""Other work on the model than text: vectors, scores and the like, one piece at a time between decoding steps."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass
from typing import Any

from ...engine.models.adapter import ModelAdapter
from ...errors import APIError, MechanexError
from .led import Parted
from .turns import Turns

__all__ = ["ModelJobs"]

_Work = Callable[[ModelAdapter], Any]
_Doing = Callable[[_Work], Any]


@dataclass(frozen=True)
class _Piece:
    work: _Work
    future: Future[Any]
    sender: str


class ModelJobs:
    """What waits for the model, and what runs on it. Any thread may add; the model's thread does.

    Senders take turns: next comes the first piece of whoever had the model for the least time.

    Who doesn't wait for a piece of work any more cancels its future, also while it runs.

    Args:
        changed: is held while the queue changes, and told when something comes.
    """

    def __init__(self, changed: threading.Condition) -> None:
        self._changed = changed
        self._waiting: list[_Piece] = []
        self._turns = Turns()
        self._running: Future[Any] | None = None
        self._closed: Exception | None = None

    def __len__(self) -> int:
        """Pieces of work that wait."""
        return len(self._waiting)

    def wanted_by(self) -> Counter[str]:
        """Those of them that somebody waits for, by their sender."""
        with self._changed:
            return Counter(piece.sender for piece in self._waiting if not piece.future.cancelled())

    @property
    def busy(self) -> bool:
        """Whether something waits or runs."""
        return bool(self._waiting) or self._running is not None

    @property
    def wanted(self) -> bool:
        """Whether somebody still waits for what runs."""
        running = self._running
        return running is not None and not running.done()

    def add(self, work: _Work, sender: str = "") -> Future[Any]:
        """Queues work; the future has its result.

        Args:
            work: is called with the model's adapter.
            sender: whose turn it takes.

        Raises:
            Exception: that which the queue was closed with; nobody would do the work any more.
        """
        future: Future[Any] = Future()
        with self._changed:
            if self._closed is not None:
                raise self._closed.with_traceback(None)
            self._waiting.append(_Piece(work, future, sender))
            self._changed.notify()
        return future

    def do_one(self, do: _Doing) -> bool:
        """Has the piece done whose turn it is; whether there was one that somebody still waits for.

        Args:
            do: does a piece of work, and gives what came of it.
        """
        with self._changed:
            self._waiting = [piece for piece in self._waiting if not piece.future.cancelled()]
            if not self._waiting:
                return False
            self._turns.meet(piece.sender for piece in self._waiting)
            piece = next(self._turns.in_turn(self._waiting, lambda _: 0.0))
            self._waiting.remove(piece)
            future = self._running = piece.future
        begun = time.perf_counter()
        try:
            result = do(piece.work)
        except BaseException as error:
            _tell(future.set_exception, _tellable(error))
        else:
            _tell(future.set_result, result)
        finally:
            self._running = None
            self._turns.note(piece.sender, time.perf_counter() - begun)
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
            waiting, self._waiting = self._waiting, []
        for piece in waiting:
            _tell(piece.future.set_exception, error)


def _tell(setting: Callable[[Any], None], end: Any) -> None:
    with contextlib.suppress(InvalidStateError):  # it has ended, or nobody waits for it
        setting(end)


def _tellable(error: BaseException) -> Exception:
    """An error that a waiting coroutine can be given: others would end its task, or leave it waiting."""
    if isinstance(error, Exception) and not isinstance(error, StopIteration):
        return error
    if isinstance(error, Parted):
        return APIError("The server ends, since a process that has a part of its model is gone.", 503)
    told = MechanexError(f"The work ended with {type(error).__name__}; the server's log has more.", 500)
    told.__cause__ = error
    return told
