"""How the JSON of a request is read: long bodies off the event loop, and none that would hold it up all the same."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Coroutine
from typing import Any

from anyio.to_thread import run_sync
from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from ...errors import ValidationError

__all__ = ["MOST_PARTS", "Route", "parsed"]

MOST_PARTS = 10_000
"""Lists and objects: each is looked at by itself, which lets nobody in meanwhile."""

_ON_THE_LOOP = 64 * 2**10
_TEXT = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)


async def parsed(body: bytes) -> Any:
    """The JSON of a body.

    Raises:
        ValueError: it is no JSON.
        ValidationError: it holds more than ``MOST_PARTS`` lists and objects.
    """
    if _n_parts(body) > MOST_PARTS and await run_sync(lambda: _n_parts(_TEXT.sub(b"", body))) > MOST_PARTS:
        raise ValidationError(f"The body holds more than {MOST_PARTS} lists and objects.")
    return json.loads(body) if len(body) <= _ON_THE_LOOP else await run_sync(json.loads, body)


def _n_parts(body: bytes) -> int:
    return body.count(b"[") + body.count(b"{")


class Route(APIRoute):
    """A route whose handler's request reads its JSON as ``_BoundedRequest`` does."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def read_and_handle(request: Request) -> Response:
            return await handle(_BoundedRequest(request.scope, request.receive))

        return read_and_handle


class _BoundedRequest(Request):
    async def json(self) -> Any:
        try:
            return await parsed(await self.body())
        except ValidationError as error:  # FastAPI takes any other than this for a body that can't be parsed
            raise HTTPException(400, error.message) from error
