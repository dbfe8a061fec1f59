"""A request for text as the scheduler sees it, and what comes back while it runs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from ..engine.sampling import Sampling

if TYPE_CHECKING:
    from ..engine.intervention import Edit

__all__ = ["Generation", "Request", "Result", "Steer", "Step", "TokenLogprob"]


@dataclass(frozen=True)
class Steer:
    """One edit of a request: of its tokens at a layer.

    Args:
        layer: 0 … n_layers.
        edit: what is done; strength included.
        tokens: absolute positions (int, slice, None for all), as in :class:`mechanex.engine.hooks.Intervention`.
    """

    layer: int
    edit: Edit
    tokens: int | slice | None = None


@dataclass(frozen=True)
class Request:
    """One prompt and how to continue it.

    Args:
        ids: token ids of the prompt, at least one (``await engine.encode(prompt)``).
        max_tokens: most tokens to add; fewer where the model's context ends before. 0 only reads the prompt.
        sampling: the method, as in ``generation.generate``.
        seed: of the draws; None draws one.
        stops: texts that end the answer and are cut off.
        steering: the request's edits, in order; empty for none.
        frequency_penalty: taken off a token's logit for every time that the answer has it.
        presence_penalty: taken off once for a token that the answer has.
        logit_bias: pairs of a token id and what is added to its logit.
        logprobs: None, or how many of the likeliest tokens to report with each chosen one's log-probability.
        prompt_logprobs: whether to report them for the prompt's tokens too.
        timeout: seconds; None for the server's setting.
        stream: whether the answer is read step by step; without it, everything comes as one step at the end.
    """

    ids: Sequence[int]
    max_tokens: int = 128
    sampling: Sampling = field(default_factory=lambda: Sampling("greedy"))
    seed: int | None = None
    stops: tuple[str, ...] = ()
    steering: tuple[Steer, ...] = ()
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    prompt_logprobs: bool = False
    timeout: float | None = None
    stream: bool = False


@dataclass(frozen=True)
class TokenLogprob:
    """A token, its natural log-probability under the steered model, and the likeliest ones in order."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Step:
    """What came since the last step: text (perhaps none yet) and, where asked for, log-probabilities.

    Args:
        text: to be joined to what came before.
        logprobs: those of its tokens.
        prompt_logprobs: those of the prompt's tokens, in the first step.
    """

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()


@dataclass(frozen=True)
class Result:
    """A finished answer.

    Args:
        text: without the prompt.
        finish_reason: ``"stop"``: an end token or a stop text; ``"length"``: no more tokens were allowed.
        prompt_tokens: tokens of the prompt.
        completion_tokens: tokens that the model chose, an end token included.
        logprobs: one per token of the text, where asked for.
        prompt_logprobs: one per token of the prompt, the first None, where asked for.
    """

    text: str
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    completion_tokens: int
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()


class Generation:
    """A request that was accepted: an asynchronous iterator of :class:`Step`, and its :class:`Result`.

    It belongs to the event loop that submitted it; the model's thread reaches it through ``deliver`` alone.
    """

    def __init__(self, request: Request) -> None:
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

    async def __aiter__(self) -> AsyncIterator[Step]:
        while True:
            if self._steps:
                steps, self._steps = self._steps, []
                if len(steps) == 1:
                    yield steps[0]
                else:
                    yield Step(
                        "".join(step.text for step in steps),
                        tuple(one for step in steps for one in step.logprobs),
                        steps[0].prompt_logprobs,
                    )
            elif self._end is not None:
                break
            else:
                self._news.clear()
                await self._news.wait()
        if isinstance(self._end, BaseException):
            raise self._end

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
