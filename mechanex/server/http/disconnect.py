"""Working only as long as someone waits for it."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import Request

from ...errors import APIError

__all__ = ["done_or_gone"]

T = TypeVar("T")


async def done_or_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of work, which is cancelled when the client goes away.

    Args:
        request: its body has been read.
        work: what it asked for.

    Raises:
        APIError: the client went away (499, which nobody sees but the log).
    """
    task: asyncio.Future[T] = asyncio.create_task(work)
    gone: asyncio.Future[None] = asyncio.create_task(_gone(request))
    first: list[asyncio.Future[Any]] = [task, gone]
    try:
        await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise APIError("The client went away.", 499)
    finally:
        gone.cancel()
        task.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
