"""Waiting for answers only as long as someone waits for them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from fastapi import Request

from .request import Generation, Result

__all__ = ["results_or_gone"]


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


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
