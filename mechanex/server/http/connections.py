"""The server's end of connections: where it listens, and how many there may be, which uvicorn doesn't bound."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

from ...errors import MechanexError
from ..settings import ServerSettings
from .head_deadline import HeadDeadline

__all__ = ["BACKLOG", "bounded", "listen", "most_connections"]

BACKLOG = 64
"""Connections that are accepted at once, before any is looked at, and as many more that wait for that."""

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

    Where there are too many, the one that has waited longest with nothing asked makes way, or else the new one.
    """

    class Bounded(HeadDeadline):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
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

    return Bounded
