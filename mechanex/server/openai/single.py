"""One answer to a chat in the shape of another API: as a whole, or as a stream of named events."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any, Protocol

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from ...errors import MechanexError
from ..http.disconnect import done_or_gone
from ..library.watched import Watching
from ..model.engine import ServingEngine
from ..model.requests import Result, TextRequest, results_of

__all__ = ["Event", "Shape", "answer_single"]

Event = tuple[str, dict[str, Any]]
"""The name of a server-sent event and its data."""

_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


class Shape(Protocol):
    """How an API tells one answer."""

    def whole(self, result: Result) -> dict[str, Any]:
        """The finished answer."""

    def begin(self) -> list[Event]:
        """What a stream tells before any text has come."""

    def more(self, text: str) -> list[Event]:
        """What it tells of more text."""

    def end(self, result: Result) -> list[Event]:
        """What it tells at the end."""

    def failed(self, error: MechanexError) -> list[Event]:
        """What it tells where the answer can't go on."""


async def answer_single(
    request: Request,
    engine: ServingEngine,
    wanted: TextRequest,
    watching: Watching,
    shape: Shape,
    *,
    stream: bool,
) -> Response:
    """Asks for an answer and tells it.

    Args:
        request: whose client may leave.
        engine: answers.
        wanted: the prompt and how to continue it.
        watching: what is watched in the answer.
        shape: tells it.
        stream: whether it is told as it comes.
    """
    (generation,) = engine.scheduler.submit_all([replace(wanted, onlooker=watching.onlooker())])
    if not stream:
        (result,) = await done_or_gone(request, results_of([generation]))
        return JSONResponse(shape.whole(result))

    async def events() -> AsyncIterator[bytes]:
        try:
            yield _written(shape.begin())
            going = True
            while going:
                for news in await generation.news():
                    if isinstance(news, Result):
                        going = False
                        yield _written(shape.end(news))
                    elif news.text:
                        yield _written(shape.more(news.text))
        except MechanexError as error:
            yield _written(shape.failed(error))
        finally:
            generation.cancel()

    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(events(), media_type="text/event-stream", headers=headers)


def _written(events: list[Event]) -> bytes:
    return b"".join(
        f"event: {name}\ndata: {_json(data)}\n\n".encode("utf-8", "replace") for name, data in events
    )
