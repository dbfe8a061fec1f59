"""The account endpoints of the Axionic API."""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime, timezone
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response

from ...errors import AuthenticationError, NotFoundError
from ..accounts.auth import Principal, is_open, principal
from ..accounts.sessions import Session
from ..accounts.store import store_of
from ..accounts.users import normalized
from ..http.limits import client_address
from ..library.kept import KeptBehavior
from ..library.threads import run_sync
from .bodies import KeyBody, LoginBody, ModelBody, NewPasswordBody, PasswordBody, RefreshBody
from .guards import CountedRoute, guards_of

__all__ = ["router", "shown"]


async def _account(who: Annotated[Principal, Depends(principal)]) -> str:
    if who.account_id is None:
        raise AuthenticationError(
            "This call is about an account, and the request has none: log in, or send an account's API key.",
            401,
        )
    return who.account_id


AccountId = Annotated[str, Depends(_account)]


async def _is_stranger(request: Request) -> bool:
    """Whether who signs up may be anybody.

    Raises:
        AuthenticationError: they may be, and the server isn't open to them.
    """
    if is_open(request):
        return False
    opened: bool = request.app.state.settings.open_signup
    try:
        known = (await principal(request)).kind == "server"
    except AuthenticationError:
        if not opened:
            raise
        known = False
    if not known and not opened:
        raise AuthenticationError("To sign up here, send the server's key: ask its operator for it.", 403)
    return not known


router = APIRouter(prefix="/auth", tags=["accounts"], route_class=CountedRoute)


@router.post("/signup")
async def sign_up(
    body: LoginBody, request: Request, stranger: Annotated[bool, Depends(_is_stranger)]
) -> dict[str, Any]:
    """Makes an account and logs it in.

    Strangers get one answer, without a session, whether their address has an account already or not.
    """
    users, guards = store_of(request).users, guards_of(request)
    if stranger:
        address = await guards.hashing(lambda: users.sign_up_unseen(body.email, body.password))
        return {"session": None, "user": {"email": address}}
    user, session = await guards.hashing(lambda: users.sign_up(body.email, body.password))
    return {"session": _session(request, session), "user": shown(user)}


@router.post("/login")
async def log_in(body: LoginBody, request: Request) -> dict[str, Any]:
    """Begins a session."""
    users, guards = store_of(request).users, guards_of(request)
    with guards.logging_in(_address(request), normalized(body.email)):
        session = await guards.hashing(lambda: users.log_in(body.email, body.password))
    return {"session": _session(request, session)}


@router.post("/refresh")
async def refresh(body: RefreshBody, request: Request) -> dict[str, Any]:
    """Exchanges a refresh token, which works once, for another pair."""
    session = await run_sync(store_of(request).sessions.refresh, body.refresh_token)
    return {"session": _session(request, session)}


@router.post("/logout", status_code=204, response_class=Response)
async def log_out(body: RefreshBody, request: Request) -> None:
    """Ends the session of a refresh token, which is all that it asks for; says nothing of texts that are none."""
    await run_sync(store_of(request).sessions.end_of, body.refresh_token)


@router.get("/sessions")
async def sessions(request: Request, account: AccountId) -> dict[str, Any]:
    """The account's sessions, one for each log-in that hasn't ended."""
    found = await run_sync(store_of(request).sessions.all, account)
    return {"sessions": [shown(session) for session in found]}


@router.delete("/sessions/{session_id:path}", status_code=204, response_class=Response)
async def end_session(session_id: str, request: Request, account: AccountId) -> None:
    """Ends a session at once."""
    await run_sync(store_of(request).sessions.end, account, session_id)


@router.post("/password")
async def change_password(body: NewPasswordBody, request: Request, account: AccountId) -> dict[str, Any]:
    """Changes the password, ends all sessions and begins one."""
    users, guards = store_of(request).users, guards_of(request)
    with guards.logging_in(_address(request), account):
        session = await guards.hashing(
            lambda: users.change_password(account, body.password, body.new_password)
        )
    return {"session": _session(request, session), "user": shown(await run_sync(users.get, account))}


@router.post("/delete-account", status_code=204, response_class=Response)
async def delete_account(body: PasswordBody, request: Request, account: AccountId) -> None:
    """Deletes the account with everything that it has made: vectors, behaviors, keys, sessions."""
    store, guards = store_of(request), guards_of(request)
    with guards.logging_in(_address(request), account):
        await guards.hashing(lambda: store.users.check_password(account, body.password))
    await run_sync(store.library.delete_all, account)
    await run_sync(store.users.delete, account)


@router.get("/whoami")
async def whoami(request: Request, who: Annotated[Principal, Depends(principal)]) -> dict[str, Any]:
    """The account that the request acts as; on a server for this machine only, the shared one without an email."""
    return shown(await run_sync(store_of(request).users.get, who.account_id)) | {"kind": who.kind}


@router.get("/api-keys")
async def api_keys(request: Request, account: AccountId) -> dict[str, Any]:
    """The account's API keys; of their text, only the beginning."""
    found = await run_sync(store_of(request).keys.all, account)
    return {"keys": [shown(key) for key in found]}


@router.post("/api-keys")
async def create_api_key(body: KeyBody, request: Request, account: AccountId) -> dict[str, Any]:
    """Makes an API key: the only answer that shows it."""
    lifetime = None if body.expires_days is None else body.expires_days * 86_400
    keys = store_of(request).keys
    key, made = await run_sync(lambda: keys.create(account, body.name, scopes=body.scopes, lifetime=lifetime))
    return shown(made) | {"key": key}


@router.post("/api-keys/set-model")
async def set_model(body: ModelBody, request: Request, account: AccountId) -> dict[str, Any]:
    """Notes the model that the account works with: one that this server runs."""
    served = request.app.state.engine.model_name
    if body.model_name != served:
        raise NotFoundError(f"this server doesn't run the model {body.model_name!r}; it runs {served!r}.")
    await run_sync(store_of(request).users.set_model, account, body.model_name)
    return {"model_name": body.model_name}


@router.delete("/api-keys/{key_id:path}", status_code=204, response_class=Response)
async def delete_api_key(key_id: str, request: Request, account: AccountId) -> None:
    """Ends an API key at once."""
    await run_sync(store_of(request).keys.delete, account, key_id)


def _address(request: Request) -> str:
    return client_address(request.client.host if request.client else None)


def shown(record: Any) -> dict[str, Any]:
    """A record as answers have it: its fields, times as ISO 8601 in UTC."""
    fields = record.as_dict() if isinstance(record, KeptBehavior) else asdict(record)
    for name in {"created_at", "expires_at", "last_used"} & set(fields):
        if fields[name] is not None:
            moment = datetime.fromtimestamp(fields[name], timezone.utc)
            fields[name] = moment.isoformat(timespec="seconds")
    return fields


def _session(request: Request, session: Session) -> dict[str, Any]:
    lifetime = store_of(request).sessions.access_lifetime
    return {**asdict(session), "token_type": "bearer", "expires_in": int(lifetime)}
