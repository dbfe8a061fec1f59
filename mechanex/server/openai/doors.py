"""What the routes of completions, in whatever API's shape, have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any

from fastapi import APIRouter, Depends

from ...errors import ValidationError
from ..accounts.auth import Principal, principal
from ..http.errors import invalid
from ..http.routes import Route

__all__ = ["Who", "about", "errors", "posts", "sent_as"]

Who = Annotated[Principal, Depends(principal)]
"""The sender of a request."""


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What a route's description says of the errors that it answers with."""
    return {status: {"description": "An error object."} for status in statuses}


def posts(tag: str, calls: Mapping[str, Callable[..., Any]], *, prefix: str = "/v1") -> APIRouter:
    """A router of calls that are asked by POST, by their paths."""
    router = APIRouter(prefix=prefix, tags=[tag], route_class=Route)
    told = errors(400, 401, 404, 413, 429, 500, 503, 504)
    for path, call in calls.items():
        router.add_api_route(path, call, methods=["POST"], responses=told)
    return router


@contextmanager
def about(param: str) -> Iterator[None]:
    """Errors inside that name no field are told to be of this one."""
    try:
        yield
    except ValidationError as error:
        details = error.details if isinstance(error.details, dict) else {}
        if details.get("param") is not None:
            raise
        raise invalid(error.message, param, details.get("code")) from error


@contextmanager
def sent_as(names: Mapping[str, str]) -> Iterator[None]:
    """Errors inside name a field as its sender does, who asked in another API's words."""
    try:
        yield
    except ValidationError as error:
        details = error.details if isinstance(error.details, dict) else {}
        ours = details.get("param")
        theirs = names.get(ours or "")
        if theirs is None:
            raise
        raise invalid(
            error.message.replace(f"'{ours}'", f"'{theirs}'"), theirs, details.get("code")
        ) from error
