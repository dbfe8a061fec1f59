"""OpenAI's answers: the objects of whole completions, and the events of streamed ones."""

from __future__ import annotations

import codecs
import json
import random
import time
from collections.abc import Sequence
from typing import Any

from ... import __version__
from ..model.requests import Result, TokenLogprob
from ..model.texts import TokenTexts

__all__ = ["DONE", "ChatReply", "CompletionReply", "Reply", "event"]

DONE = b"data: [DONE]\n\n"
_LEAST = -9999.0  # what OpenAI writes for a probability of nothing
_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


def event(body: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return _event(_json(body))


def _event(text: str) -> bytes:
    return b"data: " + text.encode("utf-8", "replace") + b"\n\n"


class Reply:
    """What the answers to one request share.

    Args:
        model: the served model's name.
        texts: single tokens as text.
        with_logprobs: whether log-probabilities were asked for.
    """

    prefix: str
    whole: str
    part: str

    def __init__(self, model: str, texts: TokenTexts, with_logprobs: bool) -> None:
        self._texts, self._with_logprobs = texts, with_logprobs
        self._id, self._created = f"{self.prefix}-{random.getrandbits(128):032x}", int(time.time())
        self._model = model
        # The same in all events of a stream.
        self._begin = _json(self._head(self.part))[:-1] + ',"choices":'

    def complete(self, choices: Sequence[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        """The whole answer."""
        return self._head(self.whole) | {"choices": list(choices), "usage": usage}

    def chunk(self, choices: Sequence[dict[str, Any]], usage: dict[str, Any] | None, ask: bool) -> bytes:
        """One event of a stream; ``ask`` is whether the client asked for the usage."""
        end = f',"usage":{_json(usage)}}}' if ask else "}"
        return _event(self._begin + _json(list(choices)) + end)

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
    """Answers of /v1/chat/completions."""

    prefix, whole, part = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def choice(self, index: int, result: Result) -> dict[str, Any]:
        """A finished answer."""
        message = {"role": "assistant", "content": result.text, "refusal": None}
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(result.logprobs),
            "finish_reason": result.finish_reason,
        }

    def first(self, index: int) -> dict[str, Any]:
        """What a stream begins with."""
        return self._delta(index, {"role": "assistant", "content": "", "refusal": None}, None, None)

    def piece(self, index: int, text: str, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        """Some more of the answer."""
        return self._delta(index, {"content": text}, self._logprobs(logprobs), None)

    def last(self, index: int, reason: str) -> dict[str, Any]:
        """What a stream ends with."""
        return self._delta(index, {}, None, reason)

    @staticmethod
    def _delta(index: int, delta: dict[str, Any], logprobs: Any, reason: str | None) -> dict[str, Any]:
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
    """Answers of /v1/completions."""

    prefix, whole, part = "cmpl", "text_completion", "text_completion"

    def choice(
        self, index: int, result: Result, echo: str | None = None, ids: Sequence[int] = ()
    ) -> dict[str, Any]:
        """A finished answer, behind its prompt where ``echo`` gives that."""
        logprobs: dict[str, Any] | None = None
        if self._with_logprobs:
            prompt = list(zip(ids, result.prompt_logprobs, strict=True)) if echo is not None else []
            answer = [(one.token, one) for one in result.logprobs]
            logprobs = self._logprobs([*prompt, *answer], 0)
        return self._choice(index, (echo or "") + result.text, logprobs, result.finish_reason)

    def echoed(
        self, index: int, echo: str, ids: Sequence[int], found: Sequence[TokenLogprob | None]
    ) -> dict[str, Any]:
        """The prompt, which a stream with ``echo`` begins with."""
        pairs = list(zip(ids, found, strict=True)) if self._with_logprobs else []
        return self._choice(index, echo, self._logprobs(pairs, 0) if self._with_logprobs else None, None)

    def piece(self, index: int, text: str, logprobs: Sequence[TokenLogprob], offset: int) -> dict[str, Any]:
        """Some more of the answer, ``offset`` characters after the begin of the text."""
        found = (
            self._logprobs([(one.token, one) for one in logprobs], offset) if self._with_logprobs else None
        )
        return self._choice(index, text, found, None)

    def last(self, index: int, reason: str) -> dict[str, Any]:
        """What a stream ends with."""
        return self._choice(index, "", None, reason)

    @staticmethod
    def _choice(index: int, text: str, logprobs: Any, reason: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, found: Sequence[tuple[int, TokenLogprob | None]], offset: int) -> dict[str, Any]:
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
