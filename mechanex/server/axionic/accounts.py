"""The account endpoints of the Axionic API."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime, timezone
from typing import Annotated, Any, TypeVar

from anyio import CapacityLimiter
from anyio.to_thread import run_sync
from fastapi import APIRouter, Depends, Request, Response

from ...errors import APIError, AuthenticationError, NotFoundError, RateLimitError
from ..accounts.auth import Principal, is_open, principal
from ..accounts.store import Store
from ..accounts.users import Account, Session, normalized
from ..http.limits import RateLimit, client_address
from .bodies import KeyBody, LoginBody, ModelBody, RefreshBody

__all__ = ["limited", "one_at_a_time", "router", "store_of", "timestamp"]

T = TypeVar("T")

LOGINS_PER_MINUTE = 10
"""Wrong passwords for one email address from one client, so that nobody can lock out others."""

LOGINS_FROM_ALL = 100
"""Wrong passwords for one email address, from wherever they come."""

# A password's hash takes 64 MiB while it is computed.
HASHES_AT_ONCE = 2


class _Guards:
    """What one application counts and bounds."""

    def __init__(self, request: Request) -> None:
        settings = request.app.state.settings
        self.addresses = RateLimit("account requests from this address", settings.rate_limit)
        self.logins = RateLimit("attempts to log in to this account", LOGINS_PER_MINUTE)
        self.logins_from_all = RateLimit("attempts to log in to this account", LOGINS_FROM_ALL)
        self.accounts = RateLimit("requests of this account", settings.api_rate_limit)
        self.hashing = CapacityLimiter(HASHES_AT_ONCE)
        self.on = not is_open(request)
        self.busy: set[str] = set()

    @staticmethod
    def of(request: Request) -> _Guards:
        state = request.app.state
        if getattr(state, "axionic_guards", None) is None:
            state.axionic_guards = _Guards(request)
        guards: _Guards = state.axionic_guards
        return guards


async def _counted(request: Request) -> None:
    """Counts a request of an address; where a proxy stands before the server, all have the same."""
    guards = _Guards.of(request)
    if guards.on:
        guards.addresses.take(_address(request))


@contextmanager
def one_at_a_time(request: Request, who: Principal) -> Iterator[None]:
    """Holds the account's place for work that keeps the model from all others; the operator has as many as it likes.

    Raises:
        RateLimitError: the account's place is taken.
    """
    busy = _Guards.of(request).busy
    if who.account_id is None:
        yield
        return
    if who.account_id in busy:
        raise RateLimitError(
            "A vector of this account is being computed: ask again when it is done.", 429, retry_after=5
        )
    busy.add(who.account_id)
    try:
        yield
    finally:
        busy.discard(who.account_id)


async def limited(request: Request, who: Annotated[Principal, Depends(principal)]) -> Principal:
    """The sender of a request that counts against its account's rate."""
    guards = _Guards.of(request)
    if guards.on:
        guards.accounts.take(who.account_id or "")
    return who


async def _account(who: Annotated[Principal, Depends(principal)]) -> str:
    if who.account_id is None:
        raise AuthenticationError(
            "This call is about an account, and the request has none: log in, or send an account's API key.",
            401,
        )
    return who.account_id


async def _newcomer(request: Request) -> None:
    settings = request.app.state.settings
    if is_open(request) or settings.open_signup:
        return
    if (await principal(request)).kind != "server":
        raise AuthenticationError("To sign up here, send the server's key: ask its operator for it.", 403)


AccountId = Annotated[str, Depends(_account)]

router = APIRouter(prefix="/auth", tags=["accounts"], dependencies=[Depends(_counted)])


@router.post("/signup", dependencies=[Depends(_newcomer)])
async def sign_up(body: LoginBody, request: Request) -> dict[str, Any]:
    """Makes an account and logs it in."""
    accounts = store_of(request).accounts
    account, session = await _hashing(request, lambda: accounts.sign_up(body.email, body.password))
    return {"session": _session(request, session), "user": _user(account)}


@router.post("/login")
async def log_in(body: LoginBody, request: Request) -> dict[str, Any]:
    """Begins a session."""
    accounts, guards = store_of(request).accounts, _Guards.of(request)
    name = normalized(body.email)
    here = f"{_address(request)} {name}"
    guards.logins.take(here)
    guards.logins_from_all.take(name)
    wrong = False
    try:
        session = await _hashing(request, lambda: accounts.log_in(body.email, body.password))
    except AuthenticationError:
        wrong = True
        raise
    finally:
        if not wrong:
            guards.logins.give_back(here)
            guards.logins_from_all.give_back(name)
    return {"session": _session(request, session)}


@router.post("/refresh")
async def refresh(body: RefreshBody, request: Request) -> dict[str, Any]:
    """Exchanges a refresh token, which works once, for another pair."""
    session = await run_sync(store_of(request).accounts.refresh, body.refresh_token)
    return {"session": _session(request, session)}


@router.get("/whoami")
async def whoami(request: Request, who: Annotated[Principal, Depends(principal)]) -> dict[str, Any]:
    """The account that the request acts as; on a server for this machine only, the shared one without an email."""
    return _user(await run_sync(store_of(request).accounts.get, who.account_id)) | {"kind": who.kind}


@router.get("/api-keys")
async def api_keys(request: Request, account: AccountId) -> dict[str, Any]:
    """The account's API keys; of their text, only the beginning."""
    found = await run_sync(store_of(request).keys.all, account)
    return {
        "keys": [
            {
                "id": key.id,
                "name": key.name,
                "key": f"{key.shown}…",
                "created_at": timestamp(key.created_at),
                "last_used": None if key.last_used is None else timestamp(key.last_used),
            }
            for key in found
        ]
    }


@router.post("/api-keys")
async def create_api_key(body: KeyBody, request: Request, account: AccountId) -> dict[str, Any]:
    """Makes an API key: the only answer that shows it."""
    return {
        "key": await run_sync(store_of(request).keys.create, account, body.name),
        "name": body.name,
    }


@router.post("/api-keys/set-model")
async def set_model(body: ModelBody, request: Request, account: AccountId) -> dict[str, Any]:
    """Notes the model that the account works with: one that this server runs."""
    served = request.app.state.engine.model_name
    if body.model_name != served:
        raise NotFoundError(f"this server doesn't run the model {body.model_name!r}; it runs {served!r}.")
    await run_sync(store_of(request).accounts.set_model, account, body.model_name)
    return {"model_name": body.model_name}


@router.delete("/api-keys/{key_id:path}", status_code=204, response_class=Response)
async def delete_api_key(key_id: str, request: Request, account: AccountId) -> None:
    """Ends an API key at once."""
    await run_sync(store_of(request).keys.delete, account, key_id)


def store_of(request: Request) -> Store:
    """The application's accounts.

    Raises:
        APIError: it was made without.
    """
    store: Store | None = request.app.state.store
    if store is None:
        raise APIError("This server keeps no accounts.", 501)
    return store


def timestamp(seconds: float) -> str:
    """A time of the database as ISO 8601, UTC."""
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="seconds")


def _address(request: Request) -> str:
    return client_address(request.client.host if request.client else None)


async def _hashing(request: Request, work: Callable[[], T]) -> T:
    return await run_sync(work, limiter=_Guards.of(request).hashing)


def _session(request: Request, session: Session) -> dict[str, Any]:
    lifetime = store_of(request).accounts.access_lifetime
    return {**asdict(session), "token_type": "bearer", "expires_in": int(lifetime)}


def _user(account: Account) -> dict[str, Any]:
    return {**asdict(account), "created_at": timestamp(account.created_at)}
