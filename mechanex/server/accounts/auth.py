"""Who sent a request, and the gate that asks before anything of its body is read."""

from __future__ import annotations

import hmac
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from fastapi import Request
from starlette.concurrency import run_in_threadpool

from ...errors import AuthenticationError
from ..http.limits import RateLimit, client_address

if TYPE_CHECKING:
    from ...engine.vectors import SteeringVector

import contextlib

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from ...errors import MechanexError
from ..http.errors import answer_to
from ..http.middleware import discard

__all__ = ["OPEN_PATHS", "Accounts", "Gate", "Principal", "check_host", "credentials", "is_open", "principal"]

WRONG_KEYS_PER_MINUTE = 60
"""From one address. Where all clients come through a proxy they have one address, and right keys go on there."""

_LOCAL_NAME = re.compile(r"([a-z0-9-]+\.)*localhost")
_LOOPBACK = re.compile(r"127(\.\d{1,3}){3}")


@dataclass(frozen=True)
class Principal:
    """Who sent a request.

    Args:
        account_id: the account, or None for the operator of the server, who owns what no account made.
        kind: ``"server"`` (the server's key), ``"account"`` (an account's API key), ``"token"`` (an account's
            access token), or ``"open"`` (a server that only this machine can reach and that was given no key; any
            key or none).
    """

    account_id: str | None
    kind: Literal["server", "account", "token", "open"]


class Accounts(Protocol):
    """What the rest of the server asks of ``app.state.store``; every method may block and is called in a thread."""

    def account_for_key(self, key: str) -> str | None:
        """The id of the account whose API key this is, or None."""

    def account_for_token(self, token: str) -> str | None:
        """The id of the account that this access token was given to, or None for a text that is none of ours.

        Raises:
            AuthenticationError: a token of ours that is expired or revoked.
        """

    def vector(self, account_id: str | None, vector_id: str) -> SteeringVector | None:
        """The account's stored vector, or None: also for another account's."""

    def behavior_vector_id(self, account_id: str | None, name: str) -> str | None:
        """The id of the vector of the account's behavior, or None."""

    def close(self) -> None:
        """Lets go of the database."""


def credentials(request: Request) -> tuple[str | None, str | None]:
    """(``x-api-key``, what follows ``Authorization: Bearer``), each None when absent or empty."""
    key = request.headers.get("x-api-key") or None
    scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
    return key, (bearer.strip() or None) if scheme.lower() == "bearer" else None


def is_open(request: Request) -> bool:
    """Whether the server takes any key or none: bound to a loopback address, and given no key."""
    state = request.app.state
    return bool(state.settings.is_loopback) and state.server_key is None


def check_host(request: Request) -> None:
    """Refuses a page of the web whose own name was made to lead to this machine, where nothing else would.

    Raises:
        AuthenticationError: an open server was called by another name than this machine's (403).
    """
    if not is_open(request):
        return
    name = re.sub(r":\d{1,5}$", "", request.headers.get("host", "localhost").lower())
    if name == "[::1]" or _LOCAL_NAME.fullmatch(name) or _LOOPBACK.fullmatch(name):
        return
    raise AuthenticationError(
        f"This server was given no key and so answers at localhost and 127.0.0.1 only, not at {name[:100]!r}: call "
        "it there, or start it with MECHANEX_SERVER_KEY.",
        403,
    )


async def principal(request: Request) -> Principal:
    """The sender of a request; a FastAPI dependency: ``who: Annotated[Principal, Depends(principal)]``.

    Either header may carry any of the three: the server's key, an account's API key, an access token.

    Raises:
        AuthenticationError: no valid credential where one is needed, or an expired token anywhere (so that a
            client refreshes it instead of losing sight of its account).
        RateLimitError: too many wrong keys came from this address.
    """
    known: Principal | None = getattr(request.state, "principal", None)
    if known is not None:  # the gate has found out
        return known
    given = [text for text in credentials(request) if text is not None]
    key: str | None = request.app.state.server_key
    peer = request.client.host if request.client else None
    client, wrong = client_address(peer), _wrong_keys(request)
    proxied = peer == "::1" or _LOOPBACK.fullmatch(client) is not None
    if given and not is_open(request) and not proxied:
        wrong.check(client)
    for text in given:
        if key is not None and hmac.compare_digest(text.encode(), key.encode()):
            return Principal(None, "server")
    store: Accounts | None = request.app.state.store
    if store is not None:
        for text in given:
            found = await run_in_threadpool(_account, store, text)
            if found is not None:
                return found
    if is_open(request):
        return Principal(None, "open")
    if given:
        wrong.take(client)
    raise AuthenticationError(
        "This server needs a key: send 'Authorization: Bearer KEY' or 'x-api-key: KEY' with the server's key, "
        "an account's API key or an access token."
        if not given
        else "The key or token is not valid here: use the server's key, an account's API key or an access token.",
        401,
    )


def _wrong_keys(request: Request) -> RateLimit:
    state = request.app.state
    if getattr(state, "wrong_keys", None) is None:
        state.wrong_keys = RateLimit("wrong keys from this address", WRONG_KEYS_PER_MINUTE)
    limit: RateLimit = state.wrong_keys
    return limit


def _account(store: Accounts, text: str) -> Principal | None:
    account = store.account_for_key(text)
    if account is not None:
        return Principal(account, "account")
    account = store.account_for_token(text)
    return None if account is None else Principal(account, "token")


_PROBES = frozenset({"/health", "/ready"})
OPEN_PATHS = frozenset({*_PROBES, "/auth/signup", "/auth/login", "/auth/refresh"})
"""What needs no key: probes, and what brings its own credentials or checks them itself."""


class Gate:
    """Nothing but ``OPEN_PATHS`` answers a sender that :func:`mechanex.server.accounts.auth.principal` doesn't know.

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
