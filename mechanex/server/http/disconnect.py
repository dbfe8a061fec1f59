"""Waiting for answers only as long as someone waits for them."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from fastapi import Request

from ...errors import APIError
from ..model.requests import Generation, Result

__all__ = ["done_or_gone", "results_or_gone"]

T = TypeVar("T")


async def results_or_gone(request: Request, generations: Sequence[Generation]) -> list[Result] | None:
    """The results of all, or None when the client went away first; then, and on an error, all are ended.

    Args:
        request: its body has been read.
        generations: what it asked for.

    Raises:
        MechanexError: that of the first answer that failed.
    """
    results: asyncio.Future[list[Result]] = asyncio.gather(*(one.result() for one in generations))
    gone: asyncio.Future[None] = asyncio.create_task(_gone(request))
    first: list[asyncio.Future[Any]] = [results, gone]
    try:
        await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
        return results.result() if results.done() else None
    finally:
        gone.cancel()
        results.cancel()
        for generation in generations:
            generation.cancel()


async def done_or_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of other work than answers, which is cancelled when the client goes away.

    Raises:
        APIError: the client went away (499).
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
