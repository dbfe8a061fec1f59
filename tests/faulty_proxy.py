"""A small HTTP server that misbehaves on demand, alone or in front of a real server.

Each request takes the next of ``faults`` (none left: it is passed on, or answered with ``{"ok": true, …}``
where there is no server behind). Every request is kept in ``requests`` with the connection that it came on::

    with FaultyProxy(upstream=server.url) as proxy:
        proxy.faults = [Status(503), Reset(), Pass()]
        client = Mechanex(proxy.url, "key")
"""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import struct
import threading
import time
import urllib.parse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

__all__ = [
    "Close",
    "Continue",
    "Cut",
    "Drip",
    "FaultyProxy",
    "Pass",
    "Raw",
    "Received",
    "Reset",
    "Stall",
    "Status",
]


@dataclass(frozen=True)
class Received:
    """A request as it came; header names in lower case."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes
    connection: int

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class Pass:
    """Passes the request on."""


@dataclass(frozen=True)
class Reset:
    """Resets the connection, after ``after`` bytes of the true answer."""

    after: int = 0


@dataclass(frozen=True)
class Close:
    """Closes the connection without an answer."""


@dataclass(frozen=True)
class Stall:
    """Says nothing for so many seconds, then closes the connection."""

    seconds: float


@dataclass(frozen=True)
class Continue:
    """Says ``100 Continue`` without end."""


@dataclass(frozen=True)
class Drip:
    """Sends the head of an endless answer, then a byte each ``every`` seconds.

    ``head``: the bytes are those of a head without end; ``most``: after so many of them nothing comes any more.
    """

    every: float = 0.05
    head: bool = False
    most: int | None = None


@dataclass(frozen=True)
class Cut:
    """Sends the true answer with its body cut to half; ``honest``: with the length that is left."""

    honest: bool = False


@dataclass(frozen=True)
class Raw:
    """Sends these bytes, and closes the connection."""

    data: bytes


@dataclass(frozen=True)
class Status:
    """Answers with this status."""

    code: int
    body: str = '{"detail": "as told"}'
    kind: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)


_ENDLESS = 120.0
"""Seconds after which what has no end ends after all: with another error than that of a call whose time is over."""

Fault = Pass | Reset | Close | Stall | Continue | Drip | Cut | Raw | Status


class FaultyProxy:
    """The server; listens on a free port of 127.0.0.1 while it is entered.

    Args:
        upstream: base URL of a server to pass requests on to.
        answer: looks at each request before ``faults`` do, and may answer it with a fault of its own.
        reads_after: seconds that each request's body waits before it is read.
        tls: speak TLS, with this context's certificate.
        cut_handshakes: so many first connections end cleanly in the middle of their handshake.
    """

    def __init__(
        self,
        upstream: str | None = None,
        answer: Callable[[Received], Fault | None] | None = None,
        *,
        reads_after: float = 0.0,
        tls: ssl.SSLContext | None = None,
        cut_handshakes: int = 0,
    ) -> None:
        self.faults: list[Fault] = []
        self.requests: list[Received] = []
        self.connections = 0
        self.answer = answer
        self.reads_after = reads_after
        self.tls = tls
        self.cut_handshakes = cut_handshakes
        self._upstream = None if upstream is None else urllib.parse.urlsplit(upstream)
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []

    @property
    def url(self) -> str:
        scheme, host = ("http", "127.0.0.1") if self.tls is None else ("https", "localhost")
        return f"{scheme}://{host}:{self._listener.getsockname()[1]}"

    def paths(self) -> list[str]:
        return [request.path for request in self.requests]

    def __enter__(self) -> FaultyProxy:
        self._start(self._accept)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            left = list(self._open)
        for connection in left:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)

    def _start(self, target: Callable[..., None], *arguments: Any) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _wait(self) -> None:
        self._over.wait(self.reads_after)

    def _accept(self) -> None:
        while not self._over.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                self.connections += 1
                number = self.connections
                self._open.add(connection)
            self._start(self._serve, connection, number)

    def _secured(self, connection: socket.socket) -> socket.socket:
        """The connection to speak HTTP on."""
        if self.tls is None:
            return connection
        with self._lock:
            cut = self.cut_handshakes > 0
            self.cut_handshakes -= cut
        if cut:
            connection.recv(1 << 16)
            raise ConnectionAbortedError
        secure = self.tls.wrap_socket(connection, server_side=True)
        with self._lock:
            self._open.add(secure)
        return secure

    def _serve(self, connection: socket.socket, number: int) -> None:
        with connection, contextlib.suppress(OSError), self._secured(connection) as connection:
            reader = connection.makefile("rb")
            while (request := _received(reader, number, self._wait)) is not None:
                with self._lock:
                    self.requests.append(request)
                    fault = self.answer(request) if self.answer is not None else None
                    if fault is None:
                        fault = self.faults.pop(0) if self.faults else Pass()
                if not self._obey(fault, connection, request):
                    break
        with self._lock:
            self._open.discard(connection)

    def _obey(self, fault: Fault, connection: socket.socket, request: Received) -> bool:
        """Does it; whether the connection goes on."""
        end = time.monotonic() + _ENDLESS
        match fault:
            case Close():
                return False
            case Raw(data):
                connection.sendall(data)
                return False
            case Stall(seconds):
                self._over.wait(seconds)
                return False
            case Continue():
                while not self._over.wait(0.001) and time.monotonic() < end:
                    connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n" * 10)
                return False
            case Drip(every, head, most):
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n")
                connection.sendall(b"X-Endless: " if head else b"\r\n ")
                sent = 0
                while not self._over.wait(every) and time.monotonic() < end:
                    if most is None or sent < most:
                        connection.sendall(b"\t" if head else b" ")
                        sent += 1
                return False
            case Status(code, body, kind, headers):
                connection.sendall(_answer(code, body.encode(), {"Content-Type": kind, **headers}))
                return True
        whole = self._passed_on(request)
        head, _, body = whole.partition(b"\r\n\r\n")
        match fault:
            case Reset(after):
                connection.sendall(whole[:after])
                if after:
                    time.sleep(0.05)  # a reset overtakes what is still on its way
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                connection.close()
                return False
            case Cut(honest):
                half = body[: len(body) // 2]
                if honest:
                    connection.sendall(_answer(200, half, {"Content-Type": "application/json"}))
                    return True
                connection.sendall(head + b"\r\n\r\n" + half)
                return False
        connection.sendall(whole)
        return True

    def _passed_on(self, request: Received) -> bytes:
        """The answer of the server behind, or that of a friendly one."""
        if self._upstream is None:
            told = {"ok": True, "path": request.path, "headers": dict(request.headers)}
            return _answer(200, json.dumps(told).encode(), {"Content-Type": "application/json"})
        import http.client

        upstream = http.client.HTTPConnection(str(self._upstream.hostname), self._upstream.port, timeout=120)
        with contextlib.closing(upstream):
            upstream.request(request.method, request.path, request.body or None, dict(request.headers))
            answer = upstream.getresponse()
            body = answer.read()
            dropped = {"content-length", "transfer-encoding", "connection"}
            kept = {name: value for name, value in answer.getheaders() if name.lower() not in dropped}
            return _answer(answer.status, body, kept)


def _received(reader: Any, connection: int, before_body: Callable[[], Any]) -> Received | None:
    line = reader.readline()
    if not line.strip():
        return None
    method, path, _ = line.decode("latin-1").split(" ", 2)
    headers: dict[str, str] = {}
    while (line := reader.readline().decode("latin-1").strip()) != "":
        name, _, value = line.partition(":")
        headers[name.lower()] = value.strip()
    before_body()
    body = reader.read(int(headers.get("content-length", 0)))
    return Received(method, path, headers, body, connection)


def _answer(status: int, body: bytes, headers: Mapping[str, str]) -> bytes:
    lines = [f"HTTP/1.1 {status} Told"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    lines += [f"Content-Length: {len(body)}", "", ""]
    return "\r\n".join(lines).encode("latin-1") + body
