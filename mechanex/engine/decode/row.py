"""One answer while it is written: its tokens, its text, its random numbers, and when it ends."""

from __future__ import annotations

import secrets
import time
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

import torch

from ..detokenize import Continuation
from ..prompt_conditions import PromptCondition
from .request import GuardedToken, Result, Steer, Step, TextRequest, TokenLogprob

__all__ = ["Row"]

_DRAWN = 64  # uniform numbers that are made at a time: one alone costs nearly as much


class Row:
    """A request on its way through the model.

    Args:
        request: the prompt and how to continue it.
        tokenizer: decodes tokens.
        ends: ids of the tokens that end an answer.
        room: positions that the model's context has, or None.
        prompt: which prompt of the caller's batch it is, and of how many, for interventions that name rows; None where
            none may.
    """

    pace = 0.0
    """Seconds from one piece that a reader is told to the next; what comes between is told with it."""

    def __init__(
        self,
        request: TextRequest,
        tokenizer: Any,
        ends: Sequence[int],
        room: int | None = None,
        prompt: tuple[int, int] | None = None,
    ) -> None:
        self.request, self.prompt = request, prompt
        self.ids = list(request.ids)
        self.max_tokens = (
            request.max_tokens if room is None else min(request.max_tokens, room - len(self.ids))
        )
        self.chosen: list[int] = []
        self.counts: Counter[int] = Counter()
        self.prompt_logprobs: list[TokenLogprob | None] = []
        self.prompt_key: tuple[object, ...] = _key_of(request, prompt)
        """Equal for rows whose prompts come to the same keys and values, edits included."""
        self.steering: tuple[Steer, ...] = tuple(s for s in request.steering if s.condition is None)
        """The edits that are in force: those whose conditions were met, and those without."""
        self.undecided: tuple[PromptCondition, ...] = _conditions(request.steering)
        """The conditions that are yet to be decided, when the prompt has been read."""
        self.guarded: list[GuardedToken] = []
        """What a guard did about each token, where there is one."""
        self.cached_tokens = 0
        """Tokens of the prompt that needn't be read, since a text before began alike."""
        self.found_prefix: tuple[object, tuple[int, int] | None] | None = None
        """What was last found of texts that begin alike, and what that depends on; for :class:`Prefixes` alone."""
        self.result: Result | None = None
        self.ends = frozenset(() if request.ignore_ends else ends) | frozenset(request.stop_token_ids)
        """Ids of the tokens that end it."""
        self._text = Continuation(
            tokenizer,
            self.ids,
            request.stops,
            include_stop=request.include_stop,
            skip_special_tokens=request.skip_special_tokens,
            min_tokens=request.min_tokens,
        )
        self.following = None if request.grammar is None else request.grammar.begin()
        """How far it has come in its grammar, where it has one."""
        # End tokens that are part of the text.
        self._kept_ends = frozenset(request.stop_token_ids if request.include_stop else ())
        # Where nobody asks for the text of each token, several are decoded at once.
        self._joined = not request.stops and request.logprobs is None
        self._n_decoded = 0
        self._due = 0.0
        self._logprobs: list[TokenLogprob] = []
        # For each of them where its text begins in the answer, and whether it has any of its own.
        self._places: list[tuple[int, bool]] = []
        self._n_unread = 1
        self._told = 0
        self._tokens_told = 0
        self._prompt_told = False
        self._generator: torch.Generator | None = None
        self._uniform: list[float] = []

    @property
    def text(self) -> str:
        """The answer once it has ended; before, as far as somebody follows it."""
        return self._text.text

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
        return len(self.ids) + max(len(self.chosen) - self._n_unread, 0)

    @property
    def final_length(self) -> int:
        """The most positions that it can come to use."""
        return len(self.ids) + self.max_tokens

    def decide(self, met: Collection[PromptCondition]) -> bool:
        """Decides its conditions, for good; whether edits come into force that were not.

        Args:
            met: those that its prompt meets.
        """
        steering = tuple(s for s in self.request.steering if s.condition is None or s.condition in met)
        changed = len(steering) > len(self.steering)
        self.steering, self.undecided = steering, ()
        return changed

    def suspend(self) -> None:
        """Leaves the batch for the queue; what was chosen stays, and is read again with the prompt."""
        self.prompt_key = (id(self),)

    def uniform(self) -> float:
        """The row's next random number in [0, 1), below 1 also in float32."""
        if not self._uniform:
            if self._generator is None:
                seed = self.request.seed
                self._generator = torch.Generator().manual_seed(
                    secrets.randbits(62) if seed is None else seed
                )
            self._uniform = torch.rand(_DRAWN, generator=self._generator).tolist()[::-1]
        return self._uniform.pop()

    def take(self, token: int, logprob: TokenLogprob | None) -> Step | None:
        """Adds the token that was chosen; sets ``result`` when the answer is done.

        Returns:
            What there is to tell a reader that follows step by step.
        """
        onlooker = self.request.onlooker
        if self.chosen and onlooker is not None and (reason := onlooker.end) is not None:
            self._n_unread = 0
            return self._finish(reason)
        self.chosen.append(token)
        self.counts[token] += 1
        ended = token in self.ends
        if not self._joined and (not ended or token in self._kept_ends):
            begin = self._text.feed(token)
            if logprob is not None:
                self._logprobs.append(logprob)
                self._places.append((begin, self._text.stopped or len(self._text.text) > begin))
        if ended or self._text.stopped:
            return self._finish("stop")
        if self.following is not None:
            self.following.take(token)
            if self.following.complete:
                return self._finish("stop")
        if len(self.chosen) >= self.max_tokens:
            return self._finish("length")
        if not self.request.stream or (self.pace and time.monotonic() < self._due):
            return None
        return self.news()

    def news(self) -> Step | None:
        """What a reader that follows was not told yet."""
        self._decode()
        step = self._step()
        if step is not None and self.pace:
            self._due = time.monotonic() + self.pace
        return step

    def finish_unread(self) -> Step | None:
        """Ends an answer that was to have no tokens."""
        return self._finish("length")

    def _finish(self, reason: Any) -> Step | None:
        self._decode()
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
            self.cached_tokens,
            tuple(self.chosen),
            self._stop() if reason == "stop" else None,
        )
        return step

    def _stop(self) -> str | int | None:
        last = self.chosen[-1]
        return self._text.stop or (last if last in self.request.stop_token_ids else None)

    def _decode(self) -> None:
        """Brings the text up to the tokens."""
        if self._joined and len(self.chosen) > self._n_decoded:
            tokens, self._n_decoded = self.chosen[self._n_decoded :], len(self.chosen)
            unseen = self.ends - self._kept_ends
            self._text.feed_all([token for token in tokens if token not in unseen])

    def _step(self, last: bool = False) -> Step | None:
        text, told = self._text.piece(), self._told
        while self._told < len(self._logprobs) and (last or self._is_out(*self._places[self._told])):
            self._told += 1
        news = tuple(self._logprobs[told : self._told])
        prompt, self._prompt_told = () if self._prompt_told else tuple(self.prompt_logprobs), True
        if not (text or news or prompt):
            return None
        tokens, self._tokens_told = tuple(self.chosen[self._tokens_told :]), len(self.chosen)
        return Step(text, news, prompt, tokens)

    def _is_out(self, begin: int, has_text: bool) -> bool:
        """Whether a token's text was given out; it may be kept back as the begin of a stop text."""
        given = self._text.given
        return begin < given or (not has_text and begin == given)


def _conditions(steering: Sequence[Steer]) -> tuple[PromptCondition, ...]:
    return tuple(dict.fromkeys(steer.condition for steer in steering if steer.condition is not None))


def _key_of(request: TextRequest, prompt: tuple[int, int] | None) -> tuple[object, ...]:
    # Edits of the same content are the same objects, alive as long as the row. A slice has no hash.
    steering = tuple(
        (
            steer.layer,
            id(steer.edit),
            steer.strength,
            repr(steer.tokens),
            id(steer.varying),
            id(steer.condition),
        )
        for steer in request.steering
    )
    wanted = request.prompt_logprobs, request.prompt_logprobs and request.logprobs
    # Whoever names rows of the batch may steer two equal prompts differently.
    return tuple(request.ids), steering, wanted, prompt, request.owner
