"""What each call needs of its sender: the one table that every route stands in, and the dependency that asks it."""

from __future__ import annotations

from typing import Any, Literal, get_args

from fastapi import Request

from ...errors import AuthenticationError
from ..library.threads import look_up
from .auth import Principal, bearer_of, principal
from .store import store_of

__all__ = ["NEEDS", "SCOPES", "Need", "Scope", "may", "permitted"]

Scope = Literal["generate", "vectors", "admin"]
"""What an API key may do: have text written, make and delete vectors and behaviors, look after the account."""

SCOPES: tuple[Scope, ...] = get_args(Scope)

Need = Scope | Literal["nothing", "any", "login", "operator"]
"""A scope, or: nothing at all; any valid credential; an access token, which keys can't stand in for; the server's
key."""

NEEDS: dict[str, Need] = {
    "GET /health": "nothing",
    "GET /ready": "nothing",
    "GET /metrics": "operator",
    "GET /openapi.json": "any",
    "POST /auth/signup": "nothing",
    "POST /auth/login": "nothing",
    "POST /auth/refresh": "nothing",
    "POST /auth/logout": "nothing",
    "GET /auth/whoami": "any",
    "GET /auth/sessions": "admin",
    "DELETE /auth/sessions/{session_id:path}": "login",
    "POST /auth/password": "login",
    "POST /auth/delete-account": "login",
    "GET /auth/api-keys": "admin",
    "POST /auth/api-keys": "login",
    "POST /auth/api-keys/set-model": "admin",
    "DELETE /auth/api-keys/{key_id:path}": "admin",
    "GET /models": "any",
    "POST /generate": "generate",
    "POST /sae/generate": "generate",
    "POST /raag/generate": "generate",
    "POST /attribution-patching/scores": "generate",
    "GET /graph": "generate",
    "GET /paths": "generate",
    "POST /steering/generate": "vectors",
    "GET /steering/vectors": "vectors",
    "DELETE /steering/vectors/{vector_id:path}": "vectors",
    "POST /behaviors/create": "vectors",
    "GET /behaviors": "vectors",
    "DELETE /behaviors/{behavior_name:path}": "vectors",
    "GET /v1/models": "any",
    "GET /v1/models/{model:path}": "any",
    "POST /v1/completions": "generate",
    "POST /v1/chat/completions": "generate",
    "POST /v1/embeddings": "generate",
    "POST /v1/responses": "generate",
    "POST /v1/messages": "generate",
    "POST /v1/messages/count_tokens": "generate",
    "POST /tokenize": "generate",
    "POST /detokenize": "generate",
    "GET /version": "any",
    "GET /page/about": "any",
    "GET /page/vectors/{vector_id:path}": "vectors",
    "POST /page/compare": "generate",
    "POST /page/sweep": "generate",
}
"""By method and path. A call that isn't here takes the scope ``admin``."""


async def permitted(request: Request) -> None:
    """Refuses a sender who may not do what the route does; a dependency of all routes.

    Raises:
        AuthenticationError: 401 for no valid credential or no account, 403 for one that isn't enough.
    """
    needed = _needed(request)
    if needed == "nothing":
        return
    who = await principal(request)
    if needed == "operator":
        if who.account_id is not None:
            raise AuthenticationError("This is for the server's operator: send the server's key.", 403)
        return
    if needed == "login" and who.account_id is None:
        raise AuthenticationError(
            "This call is about an account, and the request has none: log in with the account's password.",
            401,
        )
    if needed == "any":
        return
    if needed == "login":
        if await _is_logged_in(request, who):
            return
        raise AuthenticationError("This call takes an access token, of a log-in with the password.", 403)
    if await may(request, who, needed):
        return
    has = ", ".join(map(repr, who.scopes or ())) or "none"
    raise AuthenticationError(
        f"This API key may not do that: it needs the scope {needed!r} and has {has}. Use another key, or log in and "
        "make one.",
        403,
    )


async def may(request: Request, who: Principal, scope: Scope) -> bool:
    """Whether a sender may do what takes a scope: by its key, or by an access token beside the key."""
    return who.scopes is None or scope in who.scopes or await _is_logged_in(request, who)


def _needed(request: Request) -> Need:
    route: Any = request.scope.get("route")
    method = "GET" if request.method == "HEAD" else request.method
    path = getattr(route, "path", "")
    if path in request.app.state.open_paths and f"{method} {path}" not in NEEDS:
        return "nothing"  # a file of the playground
    return NEEDS.get(f"{method} {path}", "admin")


async def _is_logged_in(request: Request, who: Principal) -> bool:
    token = bearer_of(request)
    if token is None or who.account_id is None:
        return False
    return await look_up(store_of(request).sessions.account_for, token) == who.account_id
