"""Who sent a request: the holder of the server's key, an account, or anyone where only this machine can connect."""

from __future__ import annotations

import hmac
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from fastapi import Request
from starlette.concurrency import run_in_threadpool

from ..errors import AuthenticationError

if TYPE_CHECKING:
    from ..engine.vectors import SteeringVector
    from .settings import Settings

__all__ = ["Accounts", "Principal", "credentials", "principal"]


@dataclass(frozen=True)
class Principal:
    """Who sent a request.

    Args:
        account_id: the account, or None for the operator of the server, who owns what no account made.
        kind: ``"server"`` (the server's key), ``"account"`` (an account's API key), ``"token"`` (an account's
            access token), or ``"open"`` (a server that only this machine can reach; any key or none).
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

    def behavior(self, account_id: str | None, name: str) -> Any | None:
        """The account's behavior, or None; its ``steering_vector_id`` is a str or None."""

    def close(self) -> None:
        """Lets go of the database."""


def credentials(request: Request) -> tuple[str | None, str | None]:
    """(``x-api-key``, what follows ``Authorization: Bearer``), each None when absent or empty."""
    key = request.headers.get("x-api-key") or None
    scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
    return key, (bearer.strip() or None) if scheme.lower() == "bearer" else None


async def principal(request: Request) -> Principal:
    """The sender of a request; a FastAPI dependency: ``who: Annotated[Principal, Depends(principal)]``.

    Either header may carry any of the three: the server's key, an account's API key, an access token.

    Raises:
        AuthenticationError: no valid credential where one is needed, or an expired token anywhere (so that a
            client refreshes it instead of losing sight of its account).
    """
    settings: Settings = request.app.state.settings
    given = [text for text in credentials(request) if text is not None]
    key: str | None = request.app.state.server_key
    for text in given:
        if key is not None and hmac.compare_digest(text.encode(), key.encode()):
            return Principal(None, "server")
    store: Accounts | None = request.app.state.store
    if store is not None:
        for text in given:
            found = await run_in_threadpool(_account, store, text)
            if found is not None:
                return found
    if settings.is_loopback:
        return Principal(None, "open")
    raise AuthenticationError(
        "This server needs a key: send 'Authorization: Bearer KEY' or 'x-api-key: KEY' with the server's key, "
        "an account's API key or an access token."
        if not given
        else "The key or token is not valid here: use the server's key, an account's API key or an access token.",
        401,
    )


def _account(store: Accounts, text: str) -> Principal | None:
    account = store.account_for_key(text)
    if account is not None:
        return Principal(account, "account")
    account = store.account_for_token(text)
    return None if account is None else Principal(account, "token")
