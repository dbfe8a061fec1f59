"""Streams of OpenAI's API: the events of one or several answers as they are written."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi.responses import StreamingResponse

from ...errors import MechanexError
from ..http.errors import error_envelope
from ..model.requests import Generation, Result, Step
from .replies import DONE, ChatReply, CompletionReply, Reply, event

__all__ = ["chat_events", "completion_events", "stream_response"]

_News = list[tuple[int, "Step | Result"]]


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
    yield b"".join(reply.chunk([reply.first(i)], None, ask) for i in range(len(generations)))
    results: dict[int, Result] = {}
    async for batch in _merged(generations):
        events: list[bytes] = []
        for i, news in batch:
            if isinstance(news, Step):
                events.append(reply.chunk([reply.piece(i, news.text, news.logprobs)], None, ask))
            else:
                results[i] = news
                events.append(reply.chunk([reply.last(i, news.finish_reason)], None, ask))
        yield b"".join(events + _end(reply, results, len(generations), n, ask))


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

    async for batch in _merged(generations):
        events: list[bytes] = []
        for i, news in batch:
            events += echo(i, news.prompt_logprobs)
            if isinstance(news, Result):
                results[i] = news
                events.append(reply.chunk([reply.last(i, news.finish_reason)], None, ask))
            elif news.text or news.logprobs:
                events.append(reply.chunk([reply.piece(i, news.text, news.logprobs, offsets[i])], None, ask))
                offsets[i] += len(news.text)
        yield b"".join(events + _end(reply, results, len(generations), n, ask))


def _end(reply: Reply, results: dict[int, Result], n_answers: int, n: int, ask: bool) -> list[bytes]:
    """What comes behind the last of all answers."""
    if len(results) < n_answers:
        return []
    usage = reply.usage([results[i] for i in range(n_answers)], n) if ask else None
    return [reply.chunk([], usage, ask), DONE] if ask else [DONE]


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
