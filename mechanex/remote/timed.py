"""Connections on which a whole exchange has a deadline, where urllib3's timeouts are for each read or write."""

from __future__ import annotations

import contextlib
import io
import socket
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import requests
import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

__all__ = ["TimedAdapter", "until"]

_thread = threading.local()


@contextlib.contextmanager
def until(deadline: float) -> Iterator[None]:
    """What this thread sends and receives meanwhile, on the connections of a ``TimedAdapter``, ends by then.

    Args:
        deadline: on the clock of ``time.monotonic``; past it, a read or write raises TimeoutError.
    """
    before = getattr(_thread, "deadline", None)
    _thread.deadline = deadline
    try:
        yield
    finally:
        _thread.deadline = before


def _arm(connected: socket.socket) -> None:
    """Gives the socket's next operation the time that is left."""
    deadline = getattr(_thread, "deadline", None)
    if deadline is None:
        return
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("the time for this call is over")
    connected.settimeout(left)


class _TimedSocket:
    """A connected socket, plain or of TLS, as http.client uses one."""

    def __init__(self, connected: socket.socket) -> None:
        self._connected = connected

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connected, name)

    def sendall(self, data: ReadableBuffer) -> None:
        left = memoryview(data).cast("B")
        while left:
            _arm(self._connected)
            left = left[self._connected.send(left) :]

    def makefile(self, mode: str = "rb", *ignored: Any, **buffering: Any) -> io.BufferedReader:
        return io.BufferedReader(_TimedReads(self._connected))


class _TimedReads(io.RawIOBase):
    def __init__(self, connected: socket.socket) -> None:
        self._connected = connected
        # The socket's own file keeps it open until the answer is read, and knows when a read was given up.
        self._file = connected.makefile("rb", buffering=0)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int | None:
        _arm(self._connected)
        return self._file.readinto(buffer)

    def close(self) -> None:
        self._file.close()
        super().close()


class _TimedHTTP(HTTPConnection):
    def connect(self) -> None:
        super().connect()
        self.sock = cast("socket.socket", _TimedSocket(cast("socket.socket", self.sock)))


class _TimedHTTPS(HTTPSConnection):
    def _tunnel(self) -> None:
        # What a proxy says to CONNECT is read while the connection is still being made.
        plain = self.sock
        self.sock = cast("socket.socket", _TimedSocket(cast("socket.socket", plain)))
        try:
            super()._tunnel()
        finally:
            if self.sock is not None:  # closed, where the proxy refused
                self.sock = plain

    def connect(self) -> None:
        super().connect()
        self.sock = cast("socket.socket", _TimedSocket(cast("socket.socket", self.sock)))


class _TimedHTTPPool(urllib3.HTTPConnectionPool):
    ConnectionCls = _TimedHTTP


class _TimedHTTPSPool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _TimedHTTPS


_POOLS = {"http": _TimedHTTPPool, "https": _TimedHTTPSPool}


class TimedAdapter(requests.adapters.HTTPAdapter):
    """Of requests, with connections that keep to ``until``, straight or through an HTTP proxy."""

    def init_poolmanager(self, *arguments: Any, **options: Any) -> None:
        super().init_poolmanager(*arguments, **options)
        self.poolmanager.pool_classes_by_scheme = _POOLS

    def proxy_manager_for(self, *arguments: Any, **options: Any) -> Any:
        manager = super().proxy_manager_for(*arguments, **options)
        # A SOCKS proxy's manager has connections of its own, which only know the way through it.
        if type(manager) is urllib3.ProxyManager:
            manager.pool_classes_by_scheme = _POOLS
        return manager
