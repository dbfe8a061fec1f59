"""The door: who may come in is decided before anything of a request's body is read."""

from __future__ import annotations

import contextlib

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from ..errors import MechanexError
from .auth import check_host, principal
from .http_errors import answer_to
from .middleware import discard

__all__ = ["OPEN_PATHS", "Gate"]

_PROBES = frozenset({"/health", "/ready"})
OPEN_PATHS = frozenset({*_PROBES, "/auth/signup", "/auth/login", "/auth/refresh"})
"""What needs no key: probes, and what brings its own credentials or checks them itself."""


class Gate:
    """Nothing but ``OPEN_PATHS`` answers a sender that :func:`mechanex.server.auth.principal` doesn't know.

    Args:
        app: what is behind it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request, path = Request(scope), scope["path"]  # request.url may have what the client calls the host
        try:
            if path not in _PROBES:
                check_host(request)
            if path not in OPEN_PATHS:
                request.state.principal = await principal(request)
        except MechanexError as error:
            if request.headers.get("expect", "").lower() != "100-continue":  # else the body isn't on its way
                # A client that is still sending would see a closed connection, not the answer.
                with contextlib.suppress(HTTPException):
                    await discard(receive)
            await answer_to(request, error)(scope, receive, send)
            return
        await self._app(scope, receive, send)
