"""Plain HTTP calls to a server process, and clients that stop in the middle."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import time
from collections.abc import Iterator
from typing import Any

from server_process import ServerProcess

__all__ = ["ENDLESS", "PROMPT", "call", "streaming", "until"]

PROMPT = "Anna went to the market on Friday."
ENDLESS = {"prompt": PROMPT, "max_tokens": 480, "temperature": 0, "logit_bias": {"1": -100, "5": -100}}
"""A request that takes a while: no end token, and nearly all of the context."""


def call(
    server: ServerProcess, method: str, path: str, body: Any = None, **headers: str
) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=300)
    try:
        raw = None if body is None else json.dumps(body).encode()
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, raw, {"Content-Type": "application/json", **named})
        answer = connection.getresponse()
        return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
    finally:
        connection.close()


def until(condition: Any, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError("it did not come to that")
        time.sleep(0.02)


@contextlib.contextmanager
def streaming(server: ServerProcess, body: dict[str, Any]) -> Iterator[socket.socket]:
    """A client that has seen the begin of a stream."""
    raw = json.dumps({**body, "stream": True}).encode()
    with socket.create_connection(("127.0.0.1", server.port), timeout=120) as client:
        client.sendall(
            b"POST /v1/completions HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: "
            + str(len(raw)).encode()
            + b"\r\n\r\n"
            + raw
        )
        seen = b""
        while b"data: " not in seen:
            piece = client.recv(65536)
            assert piece, seen
            seen += piece
        yield client
