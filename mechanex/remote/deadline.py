"""Connections of requests on which a whole call has a deadline, where urllib3's timeouts are for each read or write."""

from __future__ import annotations

import contextlib
import http.client
import io
import socket
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import urllib3
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

__all__ = ["DeadlineAdapter", "GivenUp", "is_timed", "left", "until"]

_thread = threading.local()


class GivenUp(Exception):
    """A call that isn't waited for any longer; says why. Neither urllib3 nor requests catches it."""


@contextlib.contextmanager
def until(deadline: float, most_bytes: int) -> Iterator[None]:
    """What this thread does meanwhile on the connections of a ``DeadlineAdapter`` ends by then.

    Args:
        deadline: on the clock of ``time.monotonic``; past it, a connection, read or write raises GivenUp.
        most_bytes: of one answer; past them, a read raises GivenUp.
    """
    before = getattr(_thread, "deadline", None), getattr(_thread, "most_bytes", 0)
    _thread.deadline, _thread.most_bytes = deadline, most_bytes
    try:
        yield
    finally:
        _thread.deadline, _thread.most_bytes = before


def is_timed() -> bool:
    """Whether this thread is in a call of ours."""
    return getattr(_thread, "deadline", None) is not None


def left() -> float:
    """Seconds that this thread's call still has.

    Raises:
        GivenUp: none.
    """
    seconds: float = _thread.deadline - time.monotonic()
    if seconds <= 0:
        raise GivenUp("the time for this call is over; give the client a longer timeout")
    return seconds


@contextlib.contextmanager
def _in_time(connected: socket.socket) -> Iterator[None]:
    """Gives the socket's next operation the time that is left."""
    connected.settimeout(left())
    try:
        yield
    except TimeoutError:
        raise GivenUp(
            "no answer in time: the server is slow or stuck; give the client a longer timeout"
        ) from None


class _Reads(io.RawIOBase):
    """The bytes of one answer, of which there are not too many."""

    def __init__(self, connected: socket.socket, raw: io.RawIOBase) -> None:
        self._connected, self._raw, self._size = connected, raw, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int | None:
        with _in_time(self._connected):
            size = self._raw.readinto(buffer)
        self._size += size or 0
        if self._size > _thread.most_bytes:
            raise GivenUp(
                f"the answer has more than {_thread.most_bytes:,} bytes; give the client a larger max_answer_bytes"
            )
        return size

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Response(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *arguments: Any, **options: Any) -> None:
        super().__init__(sock, *arguments, **options)
        self.fp = io.BufferedReader(_Reads(sock, self.fp.detach()))


class _Connection(http.client.HTTPConnection):
    response_class = _Response

    def connect(self) -> None:
        self.timeout = left() if self.timeout is None else min(self.timeout, left())
        super().connect()

    def send(self, data: Any) -> None:
        if self.sock is None:
            self.connect()
        rest = memoryview(data)
        while rest:
            with _in_time(self.sock):
                rest = rest[self.sock.send(rest) :]


class _HTTP(_Connection, HTTPConnection):
    pass


class _HTTPS(_Connection, HTTPSConnection):
    pass


class _WholePool(urllib3.HTTPConnectionPool):
    def urlopen(self, *arguments: Any, **options: Any) -> Any:
        # Read to its end here, an answer that breaks off is one more failure that a ``Retry`` decides on.
        return super().urlopen(*arguments, **{**options, "preload_content": True})


class _HTTPPool(_WholePool):
    ConnectionCls = _HTTP


class _HTTPSPool(_WholePool, urllib3.HTTPSConnectionPool):
    ConnectionCls = _HTTPS


class DeadlineAdapter(HTTPAdapter):
    """Of requests, with connections that keep to ``until``, straight or through an HTTP proxy.

    An answer's bytes, as sent, are in ``response.raw.data``.
    """

    def init_poolmanager(self, *arguments: Any, **options: Any) -> None:
        super().init_poolmanager(*arguments, **options)
        self.poolmanager.pool_classes_by_scheme = {"http": _HTTPPool, "https": _HTTPSPool}

    def proxy_manager_for(self, *arguments: Any, **options: Any) -> Any:
        manager = super().proxy_manager_for(*arguments, **options)
        # A SOCKS proxy's manager has connections of its own, which only know the way through it.
        if type(manager) is urllib3.ProxyManager:
            manager.pool_classes_by_scheme = self.poolmanager.pool_classes_by_scheme
        return manager
