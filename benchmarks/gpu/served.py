"""Clients of the server's scheduler and model thread, in one process and without HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable

from decode_model import Letters

from mechanex.engine.models.adapter import ModelAdapter
from mechanex.server.metrics import Metrics
from mechanex.server.model.requests import TextRequest
from mechanex.server.model.scheduler import Scheduler
from mechanex.server.settings import ServerSettings

RequestOf = Callable[[int, int], TextRequest]


@contextlib.asynccontextmanager
async def scheduled(adapter: ModelAdapter) -> AsyncIterator[Scheduler]:
    """A scheduler whose thread runs and is ready."""
    scheduler = Scheduler(adapter, Letters(), [], ServerSettings(host="127.0.0.1"), Metrics())
    scheduler.start()
    try:
        while not scheduler.ready:
            if not scheduler.alive:
                raise RuntimeError("the model's thread has ended")
            await asyncio.sleep(0.001)
        yield scheduler
    finally:
        await scheduler.drain(5)


async def clients(scheduler: Scheduler, n: int, each: int, request_of: RequestOf) -> float:
    """Tokens a second of ``n`` clients that send ``each`` requests one after another.

    Args:
        request_of: the request of a client, by the client's and the request's number.
    """

    async def client(i: int) -> int:
        tokens = 0
        for k in range(each):
            generation = scheduler.submit(request_of(i, k))
            if generation.request.stream:
                async for _ in generation:
                    pass
            tokens += (await generation.result()).completion_tokens
        return tokens

    begun = time.perf_counter()
    found = await asyncio.gather(*(client(i) for i in range(n)))
    return sum(found) / (time.perf_counter() - begun)


async def first_token(scheduler: Scheduler, request: TextRequest) -> float:
    """Seconds to the first piece of a streamed answer."""
    begun = time.perf_counter()
    generation = scheduler.submit(request)
    seconds = 0.0
    async for _ in generation:
        seconds = seconds or time.perf_counter() - begun
    return seconds
