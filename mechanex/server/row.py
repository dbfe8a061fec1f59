"""One answer while it is written: its tokens, its text, its random numbers, and when it ends."""

from __future__ import annotations

import secrets
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from ..engine.detokenize import Continuation
from .request import Generation, Request, Result, Step, TokenLogprob

__all__ = ["Row"]


class Row:
    """A request on its way through the model; for the model's thread.

    Args:
        generation: what the answer goes to.
        tokenizer: decodes tokens.
        ends: ids of the tokens that end an answer.
        room: positions that the model's context has, or None.
        deadline: when, on ``time.monotonic()``'s clock, it is too late.
    """

    def __init__(
        self, generation: Generation, tokenizer: Any, ends: Sequence[int], room: int | None, deadline: float
    ) -> None:
        request = generation.request
        self.generation, self.request, self.deadline = generation, request, deadline
        self.arrived = time.monotonic()
        self.ids = list(request.ids)
        self.max_tokens = (
            request.max_tokens if room is None else min(request.max_tokens, room - len(self.ids))
        )
        self.chosen: list[int] = []
        self.counts: Counter[int] = Counter()
        self.prompt_logprobs: list[TokenLogprob | None] = []
        self.prompt_key = _key_of(request)
        """Equal for rows whose prompts come to the same keys and values, edits included."""
        self.result: Result | None = None
        self.ended = False  # whether its end was told
        self._ends = frozenset(ends)
        self._text = Continuation(tokenizer, self.ids, request.stops)
        self._logprobs: list[TokenLogprob] = []
        # For each of them where its text begins in the answer, and whether it has any of its own.
        self._places: list[tuple[int, bool]] = []
        self._told = 0
        self._prompt_told = False
        self._generator: torch.Generator | None = None

    @property
    def known(self) -> list[int]:
        """All of its tokens so far: what has to be read before the next one can be chosen."""
        return [*self.ids, *self.chosen]

    @property
    def n_known(self) -> int:
        """How many these are."""
        return len(self.ids) + len(self.chosen)

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether log-probabilities of the prompt's tokens are still to come."""
        return self.request.prompt_logprobs and not self.prompt_logprobs

    @property
    def length(self) -> int:
        """Tokens in the cache: the prompt and all that was chosen but the last, which the next step reads."""
        return len(self.ids) + max(len(self.chosen) - 1, 0)

    @property
    def final_length(self) -> int:
        """The most positions that it can come to use."""
        return len(self.ids) + self.max_tokens

    def suspend(self) -> None:
        """Leaves the batch for the queue; what was chosen stays, and is read again with the prompt."""
        self.prompt_key = (id(self),)

    def generator(self, device: torch.device) -> torch.Generator:
        """The row's own random numbers."""
        if self._generator is None:
            seed = self.request.seed
            self._generator = torch.Generator(device).manual_seed(
                secrets.randbits(62) if seed is None else seed
            )
        return self._generator

    def take(self, token: int, logprob: TokenLogprob | None) -> Step | None:
        """Adds the token that was chosen; sets ``result`` when the answer is done.

        Returns:
            What there is to tell a reader that follows step by step.
        """
        self.chosen.append(token)
        self.counts[token] += 1
        if token in self._ends:
            return self._finish("stop")
        begin = self._text.feed(token)
        if logprob is not None:
            self._logprobs.append(logprob)
            self._places.append((begin, self._text.stopped or len(self._text.text) > begin))
        if self._text.stopped:
            return self._finish("stop")
        if len(self.chosen) >= self.max_tokens:
            return self._finish("length")
        return self._step() if self.request.stream else None

    def finish_unread(self) -> Step | None:
        """Ends an answer that was to have no tokens."""
        return self._finish("length")

    def _finish(self, reason: Any) -> Step | None:
        self._text.finish()
        kept = len(self._text.text)
        if self._text.stopped:  # what was cut off with the stop text has no log-probabilities either
            while self._places and self._places[-1][0] >= kept:
                self._places.pop()
                self._logprobs.pop()
        step = self._step(last=True)
        self.result = Result(
            self._text.text,
            reason,
            len(self.ids),
            len(self.chosen),
            tuple(self._logprobs),
            tuple(self.prompt_logprobs),
        )
        return step

    def _step(self, last: bool = False) -> Step | None:
        text, told = self._text.piece(), self._told
        while self._told < len(self._logprobs) and (last or self._is_out(*self._places[self._told])):
            self._told += 1
        news = tuple(self._logprobs[told : self._told])
        prompt, self._prompt_told = () if self._prompt_told else tuple(self.prompt_logprobs), True
        return Step(text, news, prompt) if text or news or prompt else None

    def _is_out(self, begin: int, has_text: bool) -> bool:
        """Whether a token's text was given out; it may be kept back as the begin of a stop text."""
        given = self._text.given
        return begin < given or (not has_text and begin == given)


def _key_of(request: Request) -> tuple[object, ...]:
    # Edits of the same content are the same objects (Steerings.edits), alive as long as the row. A slice has no hash.
    steering = tuple((steer.layer, id(steer.edit), repr(steer.tokens)) for steer in request.steering)
    wanted = request.prompt_logprobs, request.prompt_logprobs and request.logprobs
    return tuple(request.ids), steering, wanted
