"""OpenAI's answers: the objects of whole completions, and the events of streamed ones."""

from __future__ import annotations

import codecs
import json
import random
import time
from collections.abc import Sequence
from typing import Any

from ... import __version__
from ...engine.token_texts import TokenTexts
from ..model.requests import Result, Step, TextRequest, TokenLogprob
from .inspection import Inspection
from .scores import Scores
from .tools import CallReader

__all__ = ["DONE", "ChatReply", "CompletionReply", "Reply", "event"]

DONE = b"data: [DONE]\n\n"
_LEAST = -9999.0  # what OpenAI writes for a probability of nothing
_encoder = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
_json = _encoder.encode


def event(body: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return _event(_json(body))


def _event(text: str) -> bytes:
    return b"data: " + text.encode("utf-8", "replace") + b"\n\n"


class Running:
    """The usage of each answer of a stream as far as it has come.

    Args:
        requests: one per answer.
    """

    def __init__(self, requests: Sequence[TextRequest]) -> None:
        self._prompts = [len(one.ids) for one in requests]
        self._chosen = [0] * len(requests)

    def take(self, index: int, news: Step | Result) -> None:
        """Counts the tokens that have come."""
        if isinstance(news, Step):
            self._chosen[index] += len(news.tokens)
        else:
            self._chosen[index] = news.completion_tokens

    def usage(self, index: int) -> dict[str, int]:
        """Of one answer."""
        prompt, chosen = self._prompts[index], self._chosen[index]
        return {"prompt_tokens": prompt, "completion_tokens": chosen, "total_tokens": prompt + chosen}


class Reply:
    """What the answers to one request share.

    Args:
        model: the served model's name.
        texts: single tokens as text.
        with_logprobs: whether log-probabilities were asked for.

    Attributes:
        scores: what was seen in the answers' tokens, where that was asked for.
        prompts: for each answer the token ids of its prompt, where token ids were asked for.
        inside: what of the model's inside the answers have, where that was asked for.
        running: counts what a stream has told, where every event is to have the usage.
    """

    scores: Scores | None = None
    prompts: Sequence[Sequence[int]] | None = None
    running: Running | None = None
    inside: Inspection | None = None
    prefix: str
    whole: str
    part: str

    def __init__(self, model: str, texts: TokenTexts, with_logprobs: bool) -> None:
        self._texts, self._with_logprobs = texts, with_logprobs
        self._id, self._created = f"{self.prefix}-{random.getrandbits(128):032x}", int(time.time())
        self._model = model
        # The same in all events of a stream.
        self._begin = _json(self._head(self.part))[:-1] + ',"choices":'
        self._known: dict[int, list[int]] = {}  # token ids of each answer of a stream
        self._n_told: dict[int, int] = {}

    def complete(self, results: Sequence[Result], usage: dict[str, Any]) -> dict[str, Any]:
        """The whole answer.

        Args:
            results: of the answers that are told.
            usage: of all that were made.
        """
        choices = [self.choice(i, result) | {"stop_reason": result.stop} for i, result in enumerate(results)]
        if self.prompts is not None:
            choices = [
                c | {"token_ids": list(results[i].tokens), "prompt_token_ids": list(self.prompts[i])}
                for i, c in enumerate(choices)
            ]
        if self.scores is not None:
            choices = [c | {"behaviors": self.scores.whole(i, results[i])} for i, c in enumerate(choices)]
        if self.inside is not None:
            choices = [c | self.inside.found[i] for i, c in enumerate(choices)]
        return self._head(self.whole) | {"choices": choices, "usage": usage}

    def chunk(
        self,
        choices: Sequence[dict[str, Any]],
        usage: dict[str, Any] | None,
        ask: bool,
        *,
        large: bool = False,
    ) -> bytes:
        """One event of a stream.

        Args:
            choices: what it tells.
            usage: what the request has used, or None.
            ask: whether the client asked for the usage.
            large: whether it is written piece by piece, by a thread that lets others go on.
        """
        if self.running is not None and choices:
            usage, ask = self.running.usage(choices[0]["index"]), True
        end = f',"usage":{_json(usage)}}}' if ask else "}"
        told = "".join(_encoder.iterencode(list(choices))) if large else _json(list(choices))
        return _event(self._begin + told + end)

    def choice(self, index: int, result: Result) -> dict[str, Any]:
        """A finished answer."""
        raise NotImplementedError

    def first(self, index: int) -> list[dict[str, Any]]:
        """What a stream tells of an answer before any of it has come."""
        return []

    def told(self, index: int, news: Step | Result) -> list[dict[str, Any]]:
        """What a stream tells of an answer when more of it, or its end, has come."""
        raise NotImplementedError

    def parts(self, index: int, news: Step | Result) -> list[dict[str, Any]]:
        """As ``told``, with what was seen meanwhile."""
        parts = self.told(index, news)
        if isinstance(news, Result):
            parts[-1]["stop_reason"] = news.stop
            if self.inside is not None:
                parts[-1] |= self.inside.found[index]
        if self.running is not None:
            self.running.take(index, news)
        if self.prompts is not None:
            self._tell_ids(index, news, parts)
        if self.scores is not None:
            self.scores.take(index, news)
            if parts:
                parts[-1] |= {"behaviors": self.scores.part(index, isinstance(news, Result))}
        return parts

    def _tell_ids(self, index: int, news: Step | Result, parts: list[dict[str, Any]]) -> None:
        """Adds the token ids that a stream has not told yet, and at its begin those of the prompt."""
        assert self.prompts is not None
        known = self._known.setdefault(index, [])
        if isinstance(news, Step):
            known += news.tokens
        else:
            known[:] = news.tokens
        if parts:
            if index not in self._n_told:
                parts[0]["prompt_token_ids"] = list(self.prompts[index])
            parts[-1]["token_ids"] = known[self._n_told.get(index, 0) :]
            self._n_told[index] = len(known)

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._model,
            "system_fingerprint": f"mechanex-{__version__}",
        }

    @staticmethod
    def usage(results: Sequence[Result], n: int) -> dict[str, Any]:
        """Tokens read and chosen; a prompt counts once, however many answers it has."""
        prompt = sum(result.prompt_tokens for result in results[::n])
        chosen = sum(result.completion_tokens for result in results)
        cached = sum(result.cached_tokens for result in results[::n])
        return {
            "prompt_tokens": prompt,
            "completion_tokens": chosen,
            "total_tokens": prompt + chosen,
            "prompt_tokens_details": {"cached_tokens": cached},
        }


class ChatReply(Reply):
    """Answers of /v1/chat/completions.

    Args:
        model, texts, with_logprobs: as for ``Reply``.
        calls: finds calls of tools; None where there are no tools.
    """

    prefix, whole, part = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(
        self, model: str, texts: TokenTexts, with_logprobs: bool, calls: CallReader | None = None
    ) -> None:
        super().__init__(model, texts, with_logprobs)
        self._calls = calls

    def choice(self, index: int, result: Result) -> dict[str, Any]:
        said = self._said(result)
        return {
            "index": index,
            "message": {"role": "assistant", "refusal": None, **said},
            "logprobs": self._logprobs(result.logprobs),
            "finish_reason": "tool_calls" if "tool_calls" in said else result.finish_reason,
        }

    def _said(self, result: Result) -> dict[str, Any]:
        return {"content": result.text} if self._calls is None else self._calls.message(result)

    def first(self, index: int) -> list[dict[str, Any]]:
        return [self._delta(index, {"role": "assistant", "content": "", "refusal": None})]

    def told(self, index: int, news: Step | Result) -> list[dict[str, Any]]:
        if isinstance(news, Result):
            return self._ended(index, news)
        if self._calls is not None:
            return []  # whether it is a call is known at its end
        return [self._delta(index, {"content": news.text}, self._logprobs(news.logprobs))]

    def _ended(self, index: int, result: Result) -> list[dict[str, Any]]:
        if self._calls is None:
            return [self._delta(index, {}, reason=result.finish_reason)]
        said = self._said(result)
        calls = said.pop("tool_calls", None)
        if calls is not None:
            said["tool_calls"] = [one | {"index": i} for i, one in enumerate(calls)]
        reason = result.finish_reason if calls is None else "tool_calls"
        return [
            self._delta(index, said, self._logprobs(result.logprobs)),
            self._delta(index, {}, reason=reason),
        ]

    @staticmethod
    def _delta(
        index: int, delta: dict[str, Any], logprobs: Any = None, reason: str | None = None
    ) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, found: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if not self._with_logprobs:
            return None
        content = [
            self._token(one.token, one.logprob) | {"top_logprobs": [self._token(*top) for top in one.top]}
            for one in found
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text, raw = self._texts[token]
        return {"token": text, "logprob": max(logprob, _LEAST), "bytes": list(raw)}


class CompletionReply(Reply):
    """Answers of /v1/completions.

    Args:
        model, texts, with_logprobs: as for ``Reply``.
        echoed: for each answer the text and the token ids of the prompt that it stands behind; None for none.
    """

    prefix, whole, part = "cmpl", "text_completion", "text_completion"

    def __init__(
        self,
        model: str,
        texts: TokenTexts,
        with_logprobs: bool,
        echoed: Sequence[tuple[str, Sequence[int]]] | None,
    ) -> None:
        super().__init__(model, texts, with_logprobs)
        self._echoed = echoed
        self._offsets: dict[int, int] = {}  # characters that a stream has told of each answer

    def choice(self, index: int, result: Result) -> dict[str, Any]:
        echo, found = self._echo(index, result)
        found += [(one.token, one) for one in result.logprobs]
        return self._choice(index, echo + result.text, self._logprobs(found, 0), result.finish_reason)

    def told(self, index: int, news: Step | Result) -> list[dict[str, Any]]:
        told: list[dict[str, Any]] = []
        if index not in self._offsets:
            echo, found = self._echo(index, news)
            self._offsets[index] = len(echo)
            if self._echoed is not None:
                told.append(self._choice(index, echo, self._logprobs(found, 0)))
        if isinstance(news, Result):
            told.append(self._choice(index, "", reason=news.finish_reason))
        elif news.text or news.logprobs:
            found = [(one.token, one) for one in news.logprobs]
            told.append(self._choice(index, news.text, self._logprobs(found, self._offsets[index])))
            self._offsets[index] += len(news.text)
        return told

    def _echo(self, index: int, news: Step | Result) -> tuple[str, list[tuple[int, TokenLogprob | None]]]:
        """The prompt that an answer stands behind, and what its tokens' log-probabilities are."""
        if self._echoed is None:
            return "", []
        text, ids = self._echoed[index]
        return text, list(zip(ids, news.prompt_logprobs, strict=True)) if self._with_logprobs else []

    @staticmethod
    def _choice(index: int, text: str, logprobs: Any = None, reason: str | None = None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(
        self, found: Sequence[tuple[int, TokenLogprob | None]], offset: int
    ) -> dict[str, Any] | None:
        if not self._with_logprobs:
            return None
        offsets: list[int] = []
        characters = codecs.getincrementaldecoder("utf-8")("replace")  # a character may take several tokens
        for token, _ in found:
            offsets.append(offset)
            if not self._texts.is_special(token):  # texts come without these
                offset += len(characters.decode(self._texts[token][1]))
        return {
            "tokens": [self._texts[token][0] for token, _ in found],
            "token_logprobs": [None if one is None else max(one.logprob, _LEAST) for _, one in found],
            "top_logprobs": [self._top(one) for _, one in found],
            "text_offset": offsets,
        }

    def _top(self, one: TokenLogprob | None) -> dict[str, float] | None:
        if one is None:
            return None
        named: dict[str, float] = {}
        # The likelier one keeps a text that two tokens share. The chosen one is there, likely or not.
        for token, logprob in (*one.top, (one.token, one.logprob)):
            named.setdefault(self._texts[token][0], max(logprob, _LEAST))
        return named
