"""A request for text on its way through the model: its row there, and the generation that awaits its answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from ...engine.decode.request import Result, Steer, Step, TextRequest, TokenLogprob
from ...engine.decode.row import Row
from ...engine.sae.generate import traced
from ...engine.sae.traces import TracedToken
from ...engine.sae.watching import Watch

__all__ = [
    "Generation",
    "Result",
    "ServedRow",
    "Steer",
    "Step",
    "TextRequest",
    "TokenLogprob",
    "TracedToken",
    "results_of",
    "trace_of",
    "traced",
]


class Generation:
    """A request that was accepted: an asynchronous iterator of :class:`Step`, and its :class:`Result`.

    It belongs to the event loop that submitted it; the model's thread reaches it through ``deliver`` alone.
    """

    def __init__(self, request: TextRequest) -> None:
        self.request = request
        self.cancelled = False
        self._steps: list[Step] = []
        self._end: Result | BaseException | None = None
        self._news = asyncio.Event()

    def deliver(self, news: Step | Result | BaseException) -> None:
        """Takes what came; on the event loop's thread."""
        if isinstance(news, Step):
            self._steps.append(news)
        elif self._end is None:
            self._end = news
        self._news.set()

    async def news(self) -> list[Step | Result]:
        """What came since it was last asked for, the result last; waits for something to come.

        Raises:
            MechanexError: as ``result``, once all that came before was asked for.
        """
        while not self._steps and self._end is None:
            self._news.clear()
            await self._news.wait()
        steps, self._steps = self._steps, []
        found: list[Step | Result] = [_joined(steps)] if steps else []
        if isinstance(self._end, Result):
            found.append(self._end)
        elif self._end is not None and not found:
            raise self._end
        return found

    async def __aiter__(self) -> AsyncIterator[Step]:
        while True:
            for one in await self.news():
                if isinstance(one, Result):
                    return
                yield one

    async def result(self) -> Result:
        """The whole answer, also after (part of) it was read step by step.

        Raises:
            APIError: the answer took too long (504), or the server shut down (503).
            MechanexError: the model failed (NaN logits, say).
        """
        while self._end is None:
            self._news.clear()
            await self._news.wait()
        if isinstance(self._end, BaseException):
            raise self._end
        return self._end

    def cancel(self) -> None:
        """Ends it and frees its place."""
        self.cancelled = True


def _joined(steps: list[Step]) -> Step:
    if len(steps) == 1:
        return steps[0]
    text, logprobs = "".join(step.text for step in steps), [one for step in steps for one in step.logprobs]
    tokens = tuple(token for step in steps for token in step.tokens)
    return Step(text, tuple(logprobs), steps[0].prompt_logprobs, tokens)


async def results_of(generations: Sequence[Generation]) -> list[Result]:
    """The whole answers, in order; where one fails or the caller waits no longer, all are ended.

    Raises:
        MechanexError: that of the first answer that failed.
    """
    try:
        return await asyncio.gather(*(one.result() for one in generations))
    finally:
        for one in generations:
            one.cancel()


def trace_of(result: Result, texts: Sequence[str], onlooker: object) -> tuple[TracedToken, ...]:
    """What was seen in the tokens of a finished answer, given their texts, by what looked on, if anything did."""
    return traced(result.tokens, texts, onlooker.seen if isinstance(onlooker, Watch) else ())


class ServedRow(Row):
    """A request on its way through the model; for the model's thread.

    Args:
        generation: what the answer goes to.
        tokenizer: decodes tokens.
        ends: ids of the tokens that end an answer.
        room: positions that the model's context has, or None.
        deadline: when, on ``time.monotonic()``'s clock, it is too late.
        sender: whose turn it takes.
    """

    # As smooth to a reader as more would be, and where steps are short far fewer wake-ups of the event loop.
    pace = 0.02

    def __init__(
        self,
        generation: Generation,
        tokenizer: Any,
        ends: Sequence[int],
        room: int | None,
        deadline: float,
        sender: str = "",
    ) -> None:
        super().__init__(generation.request, tokenizer, ends, room)
        self.generation, self.deadline, self.sender = generation, deadline, sender
        self.arrived = time.monotonic()
        self.ended = False  # whether its end was told
