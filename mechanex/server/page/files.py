"""The playground's files: read when first asked for, answered without a key, under a policy that lets nothing else
run."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from importlib import resources

from fastapi import APIRouter, Request, Response

from ..http.routes import Route

__all__ = ["files_router", "page_paths"]

_KINDS = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",  # the files of the next version have the same names
}


@dataclass(frozen=True)
class _File:
    content: bytes
    kind: str
    tag: str


@cache
def _names() -> dict[str, str]:
    """Names of the files by path."""
    there = [one.name for one in resources.files(__package__).joinpath("static").iterdir()]
    return {"/" if name == "index.html" else f"/page/{name}": name for name in there if _kind(name)}


def _kind(name: str) -> str | None:
    return _KINDS.get(name.rpartition(".")[2])


@cache
def _read(path: str) -> _File:
    name = _names()[path]
    content = resources.files(__package__).joinpath("static", name).read_bytes()
    return _File(content, _kind(name) or "", f'"{hashlib.sha256(content).hexdigest()[:32]}"')


def page_paths() -> frozenset[str]:
    """What the playground consists of: the same for everybody, so that it needs no key."""
    return frozenset(_names())


def files_router() -> APIRouter:
    """A route for each file; no part of a path ever names a file on the disk."""
    router = APIRouter(route_class=Route, include_in_schema=False)
    for path in sorted(page_paths()):
        router.add_api_route(path, _answer, methods=["GET", "HEAD"], response_class=Response)
    return router


async def _answer(request: Request) -> Response:
    file = _read(str(request.scope["path"]))
    headers = {**_HEADERS, "ETag": file.tag}
    if request.headers.get("if-none-match") == file.tag:
        return Response(status_code=304, headers=headers)
    return Response(file.content, media_type=file.kind, headers=headers)
