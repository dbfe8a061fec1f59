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

__all__ = ["MOST_PARTS", "MOST_VALUES", "Route", "parsed"]

MOST_PARTS = 10_000
"""Lists and objects: each is looked at by itself, which lets nobody in meanwhile."""
MOST_VALUES = 2**18
"""Values in lists and objects, since they are looked at in one go: the most token ids that are read at once."""

_ON_THE_LOOP = 64 * 2**10
# A text that doesn't end goes to the end: looking for another end at every quote would take the square of its length.
_TEXT = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)', re.DOTALL)


async def parsed(body: bytes, most_values: int = MOST_VALUES) -> Any:
    """The JSON of a body.

    Args:
        body: as it was sent.
        most_values: in all of its lists and objects.

    Raises:
        json.JSONDecodeError, UnicodeDecodeError: it is no JSON.
        ValidationError: it holds more than ``MOST_PARTS`` lists and objects or ``most_values`` values, nests too
            deeply, or holds what is JSON and can't be read all the same.
    """
    if _n_parts(body) > MOST_PARTS or body.count(b",") >= most_values:
        bare = await run_sync(lambda: _TEXT.sub(b"", body))
        if _n_parts(bare) > MOST_PARTS:
            raise ValidationError(f"The body holds more than {MOST_PARTS} lists and objects.")
        if bare.count(b",") >= most_values:
            raise ValidationError(f"The body holds more than {most_values} values.")
    try:
        return json.loads(body) if len(body) <= _ON_THE_LOOP else await run_sync(json.loads, body)
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise
    except RecursionError:
        raise ValidationError("The body nests its lists and objects too deeply.") from None
    except ValueError:
        raise ValidationError("The body holds a whole number of too many digits.") from None


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
        # FastAPI takes any other than this for a body that can't be parsed.
        except ValidationError as error:
            raise HTTPException(400, error.message) from error
        except UnicodeDecodeError as error:
            message = f"The body is not valid JSON: it is no UTF-8 ({error.reason})."
            raise HTTPException(400, message) from error
