"""Streams of OpenAI's API: the events of one or several answers as they are written."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial

from anyio.to_thread import run_sync
from fastapi.responses import StreamingResponse

from ...errors import MechanexError
from ..http.errors import error_envelope
from ..model.requests import Generation, Result, Step
from .replies import DONE, Reply, event

__all__ = ["stream_response"]

_News = list[tuple[int, "Step | Result"]]


def stream_response(
    reply: Reply, generations: Sequence[Generation], n: int, ask: bool, public: Callable[[str], str]
) -> StreamingResponse:
    """Server-sent events until ``[DONE]``; an error becomes an event, and a client that goes ends the answers.

    Args:
        reply: tells the answers.
        generations: what they come from.
        n: answers to a prompt.
        ask: whether the usage is wanted.
        public: makes an error's message one for clients.
    """

    async def guarded() -> AsyncIterator[bytes]:
        try:
            async for one in _events(reply, generations, n, ask):
                yield one
        except MechanexError as error:
            yield event(error_envelope(error, public))
            yield DONE
        finally:
            # The client may have gone; an answer that has ended doesn't mind.
            for generation in generations:
                generation.cancel()

    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(guarded(), media_type="text/event-stream", headers=headers)


async def _events(reply: Reply, generations: Sequence[Generation], n: int, ask: bool) -> AsyncIterator[bytes]:
    first = [choice for i in range(len(generations)) for choice in reply.first(i)]
    if first:
        yield b"".join(reply.chunk([choice], None, ask) for choice in first)
    results: dict[int, Result] = {}
    async for batch in _merged(generations):
        if reply.inside is not None:
            for i, news in batch:
                if isinstance(news, Result):
                    await reply.inside.read(i, news)
        ended = reply.inside is not None and any(isinstance(news, Result) for _, news in batch)
        if ended or any(news.prompt_logprobs for _, news in batch):
            told = await run_sync(partial(_chunks, reply, batch, ask, large=True))
        else:
            told = _chunks(reply, batch, ask)
        results.update((i, news) for i, news in batch if isinstance(news, Result))
        if len(results) == len(generations):
            if ask:
                told.append(reply.chunk([], reply.usage([results[i] for i in sorted(results)], n), ask))
            told.append(DONE)
        yield b"".join(told)


def _chunks(reply: Reply, batch: _News, ask: bool, *, large: bool = False) -> list[bytes]:
    return [
        reply.chunk([choice], None, ask, large=large) for i, news in batch for choice in reply.parts(i, news)
    ]


async def _merged(generations: Sequence[Generation]) -> AsyncIterator[_News]:
    """What there is to tell of several answers, as it comes, each one's result at its end."""
    if len(generations) == 1:
        going = True
        while going:
            found = await generations[0].news()
            going = not isinstance(found[-1], Result)
            yield [(0, one) for one in found]
        return
    queue: asyncio.Queue[_News | Exception] = asyncio.Queue()

    async def follow(i: int, generation: Generation) -> None:
        try:
            going = True
            while going:
                found = await generation.news()
                going = not isinstance(found[-1], Result)
                queue.put_nowait([(i, one) for one in found])
        except Exception as error:
            queue.put_nowait(error)

    tasks = [asyncio.create_task(follow(i, one)) for i, one in enumerate(generations)]
    try:
        left = len(tasks)
        while left:
            news = await queue.get()
            if isinstance(news, Exception):
                raise news
            left -= isinstance(news[-1][1], Result)
            yield news
    finally:
        for task in tasks:
            task.cancel()
