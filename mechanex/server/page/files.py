"""The playground's files: read once, answered without a key, and under a policy that lets nothing else run."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib import resources

from fastapi import APIRouter, Request, Response

from ..http.routes import Route

__all__ = ["PAGE_PATHS", "files_router"]

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


def _read() -> dict[str, _File]:
    found = {}
    for one in resources.files(__package__).joinpath("static").iterdir():
        kind = _KINDS.get(one.name.rpartition(".")[2])
        if kind is not None:
            content = one.read_bytes()
            path = "/" if one.name == "index.html" else f"/page/{one.name}"
            found[path] = _File(content, kind, f'"{hashlib.sha256(content).hexdigest()[:32]}"')
    return found


_FILES = _read()

PAGE_PATHS = frozenset(_FILES)
"""What the playground consists of: the same for everybody, so that it needs no key."""


def files_router() -> APIRouter:
    """A route for each file; no part of a path ever names a file on the disk."""
    router = APIRouter(route_class=Route, include_in_schema=False)
    for path in sorted(_FILES):
        router.add_api_route(path, _answer, methods=["GET", "HEAD"], response_class=Response)
    return router


async def _answer(request: Request) -> Response:
    file = _FILES[str(request.scope["path"])]
    headers = {**_HEADERS, "ETag": file.tag}
    if request.headers.get("if-none-match") == file.tag:
        return Response(status_code=304, headers=headers)
    return Response(file.content, media_type=file.kind, headers=headers)
