"""Who sent a request, and the gate that asks before anything of its body is read."""

from __future__ import annotations

import contextlib
import hmac
import re
from dataclasses import dataclass
from typing import Literal

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from ...errors import AuthenticationError, MechanexError
from ..http.errors import answer_to
from ..http.limits import RateLimit, TokenQuota, client_address
from ..http.middleware import discard, telling
from ..library.threads import look_up
from ..senders import sent_by
from .api_keys import KeyExpiredError
from .sessions import SESSION_ENDED, is_access_token
from .store import Store, store_of

__all__ = [
    "OPEN_PATHS",
    "WRONG_KEYS_PER_MINUTE",
    "AuthenticationMiddleware",
    "Principal",
    "bearer_of",
    "is_open",
    "principal",
]

WRONG_KEYS_PER_MINUTE = 60
"""From one address. Where all clients come through a proxy they have one address, and right keys go on there."""

_PROBES = frozenset({"/health", "/ready"})
OPEN_PATHS = frozenset({*_PROBES, "/auth/signup", "/auth/login", "/auth/refresh", "/auth/logout"})
"""What needs no key: probes, and what brings its own credentials or checks them itself."""

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
        scopes: what an API key may do; None for all that its kind may.
    """

    account_id: str | None
    kind: Literal["server", "account", "token", "open"]
    scopes: tuple[str, ...] | None = None


class AuthenticationMiddleware:
    """Nothing but the open paths answers a sender that ``principal`` doesn't know.

    Args:
        app: what is behind it.
        open_paths: what needs no key.
    """

    def __init__(self, app: ASGIApp, open_paths: frozenset[str] = OPEN_PATHS) -> None:
        self._app, self._open = app, open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request, path = Request(scope), scope["path"]  # request.url may have what the client calls the host
        try:
            if path not in _PROBES:
                _check_host(request)
            if path not in self._open:
                request.state.principal = who = await principal(request)
                sender = who.account_id or client_address(request.client.host if request.client else None)
                sent_by(sender)
                quota: TokenQuota | None = request.app.state.token_quota
                if quota is not None:
                    send = telling(send, lambda: quota.headers(sender))
        except MechanexError as error:
            if request.headers.get("expect", "").lower() != "100-continue":  # else the body isn't on its way
                # A client that is still sending would see a closed connection, not the answer.
                with contextlib.suppress(HTTPException):
                    await discard(receive)
            await answer_to(request, error)(scope, receive, send)
            return
        await self._app(scope, receive, send)


async def principal(request: Request) -> Principal:
    """The sender of a request; a FastAPI dependency: ``who: Annotated[Principal, Depends(principal)]``.

    ``x-api-key`` or ``Authorization: Bearer``: either may carry any of the three, the server's key, an account's
    API key, an access token.

    Raises:
        AuthenticationError: no valid credential where one is needed, or anywhere an access token that is none any
            more (so that a client refreshes it instead of losing sight of its account), or an API key that has expired.
        RateLimitError: too many wrong keys came from this address.
    """
    known: Principal | None = getattr(request.state, "principal", None)
    if known is not None:  # the gate has found out
        return known
    given, opened = _credentials(request), is_open(request)
    key: str | None = request.app.state.server_key
    wrong: RateLimit = request.app.state.wrong_keys
    peer = request.client.host if request.client else None
    client = client_address(peer)
    proxied = peer == "::1" or _LOOPBACK.fullmatch(client) is not None
    if given and not opened and not proxied:
        wrong.check(client)
    for text in given:
        if key is not None and hmac.compare_digest(text.encode(), key.encode()):
            return Principal(None, "server")
    expired: AuthenticationError | None = None
    for text in given:
        try:
            found = await look_up(_account, store_of(request), text)
        except KeyExpiredError as error:  # beside it there may be a token that is good
            expired = error
            continue
        if found is not None:
            return found
    if expired is not None:
        raise expired
    ended = any(map(is_access_token, given))
    if opened and not ended:
        return Principal(None, "open")
    if given and not opened:
        wrong.take(client)
    raise AuthenticationError(
        SESSION_ENDED
        if ended
        else "The key or token is not valid here: use the server's key, an account's API key or an access token."
        if given
        else "This server needs a key: send 'Authorization: Bearer KEY' or 'x-api-key: KEY' with the server's key, "
        "an account's API key or an access token.",
        401,
    )


def is_open(request: Request) -> bool:
    """Whether the server takes any key or none: bound to a loopback address, and given no key."""
    state = request.app.state
    return bool(state.settings.is_loopback) and state.server_key is None


def bearer_of(request: Request) -> str | None:
    """What a request has in ``Authorization: Bearer``, or None."""
    scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
    return bearer.strip() or None if scheme.lower() == "bearer" else None


def _credentials(request: Request) -> list[str]:
    given = (request.headers.get("x-api-key"), bearer_of(request))
    return [text for text in given if text]


def _account(store: Store, text: str) -> Principal | None:
    key = store.keys.opened_by(text)
    if key is not None:
        return Principal(key.account_id, "account", key.scopes)
    account = store.sessions.account_for(text)
    return None if account is None else Principal(account, "token")


def _check_host(request: Request) -> None:
    """Refuses a page of the web whose own name was made to lead to this machine, where nothing else would."""
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
