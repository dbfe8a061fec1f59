"""Streams of OpenAI's API: the events of one or several answers as they are written."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi.responses import StreamingResponse

from ..errors import MechanexError
from .http_errors import error_envelope
from .replies import DONE, ChatReply, CompletionReply, Reply, event
from .request import Generation, Result, Step

__all__ = ["chat_events", "completion_events", "stream_response"]

_News = tuple[int, "Step | Result | Exception"]


def stream_response(events: AsyncIterator[bytes], generations: Sequence[Generation]) -> StreamingResponse:
    """Server-sent events until ``[DONE]``; an error becomes an event, and a client that goes ends the answers."""

    async def guarded() -> AsyncIterator[bytes]:
        try:
            async for one in events:
                yield one
        except MechanexError as error:
            yield event(error_envelope(error))
            yield DONE
        finally:
            # The client may have gone; an answer that has ended doesn't mind.
            for generation in generations:
                generation.cancel()

    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(guarded(), media_type="text/event-stream", headers=headers)


async def chat_events(
    reply: ChatReply, generations: Sequence[Generation], n: int, ask: bool
) -> AsyncIterator[bytes]:
    """The events of a chat's answers; ``ask`` is whether the usage is wanted, of ``n`` answers to a prompt."""
    for i in range(len(generations)):
        yield reply.chunk([reply.first(i)], None, ask)
    results: dict[int, Result] = {}
    async for i, news in _merged(generations):
        if isinstance(news, Step):
            yield reply.chunk([reply.piece(i, news.text, news.logprobs)], None, ask)
        else:
            results[i] = news
            yield reply.chunk([reply.last(i, news.finish_reason)], None, ask)
    if ask:
        yield reply.chunk([], _usage(reply, results, n), ask)
    yield DONE


async def completion_events(
    reply: CompletionReply, generations: Sequence[Generation], echoes: list[str] | None, n: int, ask: bool
) -> AsyncIterator[bytes]:
    """The events of completions, each behind its prompt where ``echoes`` has that."""
    offsets = [0] * len(generations)
    begun = [echoes is None] * len(generations)
    results: dict[int, Result] = {}

    def echo(i: int, logprobs: Any) -> list[bytes]:
        if begun[i] or echoes is None:
            return []
        begun[i], offsets[i] = True, len(echoes[i])
        return [reply.chunk([reply.echoed(i, echoes[i], generations[i].request.ids, logprobs)], None, ask)]

    async for i, news in _merged(generations):
        for chunk in echo(i, news.prompt_logprobs):
            yield chunk
        if isinstance(news, Step):
            if news.text or news.logprobs:
                yield reply.chunk([reply.piece(i, news.text, news.logprobs, offsets[i])], None, ask)
                offsets[i] += len(news.text)
        else:
            results[i] = news
            yield reply.chunk([reply.last(i, news.finish_reason)], None, ask)
    if ask:
        yield reply.chunk([], _usage(reply, results, n), ask)
    yield DONE


def _usage(reply: Reply, results: dict[int, Result], n: int) -> dict[str, Any]:
    return reply.usage([results[i] for i in range(len(results))], n)


async def _merged(generations: Sequence[Generation]) -> AsyncIterator[tuple[int, Step | Result]]:
    """The steps of several answers as they come, and each one's result at its end."""
    if len(generations) == 1:
        async for step in generations[0]:
            yield 0, step
        yield 0, await generations[0].result()
        return
    news: asyncio.Queue[_News] = asyncio.Queue()

    async def follow(i: int, generation: Generation) -> None:
        try:
            async for step in generation:
                news.put_nowait((i, step))
            news.put_nowait((i, await generation.result()))
        except Exception as error:
            news.put_nowait((i, error))

    tasks = [asyncio.create_task(follow(i, one)) for i, one in enumerate(generations)]
    try:
        going = len(tasks)
        while going:
            i, one = await news.get()
            if isinstance(one, Exception):
                raise one
            going -= isinstance(one, Result)
            yield i, one
    finally:
        for task in tasks:
            task.cancel()
