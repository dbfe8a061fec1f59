"""Around every request: an id, a limit to its body, a line in the log, and a place in the metrics."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import re
import time
from collections.abc import Callable, Mapping

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ...errors import APIError
from ..metrics import Metrics
from .errors import INTERNAL, answer_to, error_answer

__all__ = ["RequestMiddleware", "discard", "telling"]

_logger = logging.getLogger(__name__)
_access = logging.getLogger("mechanex.server.access")
_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_MOST_DISCARDED = 64 * 2**20
_IDLE_SECONDS = 2.0
_BODY_SECONDS = 30.0  # a client that sends more slowly is let go


class RequestMiddleware:
    """Wraps the application.

    The id is the client's ``x-request-id`` where that is a plain word, else a new one; the answer carries it. A line
    of the log is one JSON object; neither prompts nor keys are in it.

    Args:
        app: the application.
        metrics: what is counted.
        max_body_bytes: largest body; a larger one is answered with 413.
        small_bodies: largest body by the beginning of a path, where it is smaller.
    """

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        max_body_bytes: int,
        small_bodies: Mapping[str, int] | None = None,
    ) -> None:
        self._app, self._metrics, self._most, self._small = app, metrics, max_body_bytes, small_bodies or {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _ID.fullmatch(given) else f"{random.getrandbits(128):032x}"
        scope.setdefault("state", {})["request_id"] = request_id
        begun, status = time.perf_counter(), 0
        # A HEAD is answered as a GET, of which the server then sends the head.
        asked = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope
        small = [size for prefix, size in self._small.items() if scope["path"].startswith(prefix)]
        most = min([self._most, *small])

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = int(message["status"])
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            refusal = _refusal(Request(scope), headers, most)
            if refusal is not None:
                await discard(receive)
                await refusal(scope, receive, sending)
                return
            await self._app(asked, _limited(receive, most), sending)
        except ClientDisconnect:
            pass  # in the middle of its body
        except asyncio.CancelledError:  # uvicorn's time to end is over, and this request's task ends anyway
            if not status:
                over = APIError("The server is shutting down; try another one.", 503)
                await answer_to(Request(scope), over)(scope, receive, sending)
            raise
        except Exception:
            _logger.exception("request %s failed", request_id)
            if not status:
                await error_answer(Request(scope), 500, INTERNAL)(scope, receive, sending)
        finally:
            route = getattr(asked.get("route"), "path", None)
            self._note(scope, route, request_id, status, time.perf_counter() - begun)

    def _note(self, scope: Scope, route: object, request_id: str, status: int, seconds: float) -> None:
        path = route if isinstance(route, str) else "other"
        # A client that left before its answer began got no status; 499 is what proxies call it.
        self._metrics.requests.labels(path, str(status or 499)).inc()
        self._metrics.request_seconds.labels(path).observe(seconds)
        if _access.isEnabledFor(logging.INFO):
            line = {
                "event": "request",
                "id": request_id,
                "method": scope["method"],
                "path": scope["path"][:200],
                "status": status or 499,
                "seconds": round(seconds, 4),
                "client": (scope.get("client") or ("", 0))[0],
                **scope["state"].get("log", {}),
            }
            _access.info("%s", json.dumps(line))


def _refusal(request: Request, headers: Headers, most: int) -> Response | None:
    """The answer to a head that forbids reading its body; it ends the connection, of which the rest is not read."""
    close = {"connection": "close"}
    length = headers.get("content-length", "")
    if length and "transfer-encoding" in headers:
        # Two ends of one body: proxies that take the other one see a second request in it.
        return error_answer(
            request, 400, "A request has a Content-Length or a Transfer-Encoding, not both.", headers=close
        )
    if length.isascii() and length.isdigit() and (len(length) > 15 or int(length) > most):
        return error_answer(request, 413, _too_large(most), code="request_too_large", headers=close)
    return None


def _limited(receive: Receive, most: int) -> Receive:
    taken, whole = 0, False
    deadline = time.monotonic() + _BODY_SECONDS

    async def receiving() -> Message:
        nonlocal taken, whole
        if whole:
            return await receive()
        try:
            message = await asyncio.wait_for(receive(), max(deadline - time.monotonic(), 0.001))
        except asyncio.TimeoutError:
            raise HTTPException(408, "The request's body took too long to arrive.") from None
        if message["type"] == "http.request":
            taken += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if taken > most:
                if not whole:
                    await discard(receive)
                raise HTTPException(413, _too_large(most))
        return message

    return receiving


def telling(send: Send, headers: Callable[[], Mapping[str, str]]) -> Send:
    """Sends answers with further headers, which are asked for when an answer begins."""

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message).update(headers())
        await send(message)

    return sending


def _too_large(most: int) -> str:
    return f"The request's body is larger than the {most} bytes that this server takes here."


async def discard(receive: Receive) -> None:
    """Reads on, within reason: a client that is still sending sees a closed connection, not the answer."""
    left, deadline = _MOST_DISCARDED, time.monotonic() + _BODY_SECONDS
    while left > 0 and (seconds := deadline - time.monotonic()) > 0:
        try:
            message = await asyncio.wait_for(receive(), min(seconds, _IDLE_SECONDS))
        except asyncio.TimeoutError:
            return
        left -= len(message.get("body", b""))
        if message["type"] != "http.request" or not message.get("more_body", False):
            return
