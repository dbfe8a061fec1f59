"""A server in a thread of its own, for notebooks and other programs that go on."""

from __future__ import annotations

import atexit
import threading
import time
from typing import TYPE_CHECKING

from ..errors import MechanexError

if TYPE_CHECKING:
    from .serve import Listening

__all__ = ["RunningServer"]

_END_SECONDS = 10.0  # beyond the time that running answers have


class RunningServer:
    """A server that runs in a thread until ``stop``, or until the program ends. A context manager, too.

    Attributes:
        url: where it answers on this machine; OpenAI's API is under ``/v1``.
        key: the key that every client sends, or None where none is asked for.

    Raises:
        MechanexError: it did not start.
    """

    def __init__(self, listening: Listening) -> None:
        self.url, self.key = listening.local_url, listening.key
        self._listening = listening
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="mechanex-server", daemon=True)
        self._thread.start()
        listening.server.settled.wait()
        if not listening.server.started:
            self._thread.join(_END_SECONDS)
            raise MechanexError("the server did not start; its log says why.") from self._error
        atexit.register(self.stop)

    @property
    def running(self) -> bool:
        """Whether it still serves."""
        return self._thread.is_alive()

    def stop(self) -> None:
        """Takes no more requests, gives running answers the time of ``shutdown_grace``, and ends; twice does nothing.

        Raises:
            MechanexError: it has not ended in that time, since the model is at work that can't be stopped.
        """
        atexit.unregister(self.stop)
        self._listening.server.should_exit = True
        self._thread.join(self._listening.grace + _END_SECONDS)
        end = time.monotonic() + _END_SECONDS
        while self._listening.scheduler.alive and time.monotonic() < end:
            time.sleep(0.01)
        if self._thread.is_alive() or self._listening.scheduler.alive:
            raise MechanexError("the server has not ended yet: the model is at work that can't be stopped.")

    def _run(self) -> None:
        try:
            self._listening.run()
        except BaseException as error:
            self._error = error
        finally:
            self._listening.server.settled.set()

    def __enter__(self) -> RunningServer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def __repr__(self) -> str:
        return f"<mechanex server at {self.url}, {'running' if self.running else 'stopped'}>"
