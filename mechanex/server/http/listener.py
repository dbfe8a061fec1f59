"""The server's end of connections: how many there may be, and how long one may take to say what it wants."""

from __future__ import annotations

import asyncio
import socket
import time
from typing import Any

from ..._private.uvicorn import H11Protocol
from ...errors import MechanexError
from ..settings import ServerSettings

__all__ = ["BACKLOG", "bounded", "listen", "most_connections"]

BACKLOG = 64
"""Connections that are accepted at once, before any is looked at, and as many more that wait for that."""

HEAD_SECONDS = 10.0
"""In which a whole request head must come, from the connection's begin or from the head's first byte."""

_OTHER_FILES = (
    300  # the model's, the database's, the log's, and connections that were accepted and not looked at yet
)
_MOST_FILES = 65_536


def listen(settings: ServerSettings) -> socket.socket:
    """A socket that listens at the settings' address.

    Raises:
        MechanexError: the address is taken or isn't this machine's.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # Without the protocol's name asyncio sets no TCP_NODELAY, and each answer on a kept connection waits 40 ms.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((settings.host.strip("[]"), settings.port))
        listening.listen(BACKLOG)
    except OSError as error:
        listening.close()
        reason = error.strerror or str(error)
        raise MechanexError(
            f"can't listen at {settings.host}:{settings.port} ({reason}): choose another host or port."
        ) from error
    listening.setblocking(False)
    return listening


def most_connections() -> int:
    """How many connections this process can hold; lets it hold as many as the system does."""
    try:
        import resource
    except ImportError:  # Windows
        return 1000
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    return max(64, (_MOST_FILES if soft == resource.RLIM_INFINITY else soft) - _OTHER_FILES)


def bounded(most: int) -> type[asyncio.Protocol]:
    """Uvicorn's protocol for at most so many connections.

    A connection that doesn't send a whole request head in ``HEAD_SECONDS`` is closed. Where there are too many, the
    one that has waited longest with nothing asked makes way, or else the new one.
    """

    class Bounded(H11Protocol):
        waits_since: float | None = None
        """When it began to owe a head; None while a request is answered."""

        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._owe_head()
            if len(self.connections) <= most:
                return
            # One that was made to go is still among them until the event loop's next turn.
            there = [
                one for one in self.connections if isinstance(one, Bounded) and not one.transport.is_closing()
            ]
            if len(there) > most:
                waits = {
                    one: one.waits_since for one in there if one.waits_since is not None and one is not self
                }
                longest = min(waits, key=lambda one: waits[one], default=self)
                longest.transport.abort()

        def data_received(self, data: bytes) -> None:
            before = self.cycle
            super().data_received(data)
            if self.cycle is not before:
                self._settle()
                self.waits_since = None
            elif self._timer is None and (self.cycle is None or self.cycle.response_complete):
                self._owe_head()  # uvicorn's own timer of kept connections ends with the first byte

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if self.cycle.response_complete:  # no other request was waiting
                self.waits_since = time.monotonic()

        def connection_lost(self, exc: Exception | None) -> None:
            self._settle()
            super().connection_lost(exc)

        def _owe_head(self) -> None:
            self.waits_since = time.monotonic()
            self._timer = self.loop.call_later(HEAD_SECONDS, self.transport.close)

        def _settle(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    return Bounded
