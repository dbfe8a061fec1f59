"""vLLM's answer to a watched request as it goes to the client: why it ended, and what was seen in it."""

from __future__ import annotations

import json
import math
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from ..engine.token_texts import TokenTexts
from .watched import SHOWED

__all__ = ["WatchedAnswer"]

_Message = MutableMapping[str, Any]
_Send = Callable[[_Message], Awaitable[None]]


class WatchedAnswer:
    """Takes vLLM's messages to a client, and sends them on.

    Args:
        send: sends a message on.
        seen: gives what was seen in the request's one answer; None where the client asked for no scores.
        texts: single tokens as text.
        hides_ids: whether the client didn't ask for the ids of the answer's tokens, which scores need.
    """

    def __init__(
        self,
        send: _Send,
        seen: Callable[[], Awaitable[list[Any]]] | None,
        texts: Callable[[], TokenTexts],
        hides_ids: bool,
    ) -> None:
        self._send, self._seen, self._texts, self._hides_ids = send, seen, texts, hides_ids
        self._start: _Message | None = None
        self._is_stream = False
        self._left = b""
        self._ids: list[int] = []

    async def send(self, message: _Message) -> None:
        """Takes the next message."""
        if message["type"] == "http.response.start":
            headers = [
                (name, value) for name, value in message["headers"] if name.lower() != b"content-length"
            ]
            kind = next((value for name, value in headers if name.lower() == b"content-type"), b"")
            self._is_stream = kind.startswith(b"text/event-stream")
            self._start = {**message, "headers": headers}
            if self._is_stream:
                await self._send(self._start)
            return
        if message["type"] != "http.response.body" or self._start is None:
            await self._send(message)
            return
        self._left += message.get("body", b"")
        more = message.get("more_body", False)
        if self._is_stream:
            *events, self._left = self._left.split(b"\n\n")
            body = b"".join([await self._event(one) + b"\n\n" for one in events])
            if not more:
                body += self._left
            await self._send({**message, "body": body})
        elif not more:
            body = await self._changed(self._left) if self._start["status"] == 200 else self._left
            length = (b"content-length", str(len(body)).encode())
            await self._send({**self._start, "headers": [*self._start["headers"], length]})
            await self._send({"type": "http.response.body", "body": body})

    async def _event(self, event: bytes) -> bytes:
        data = event.removeprefix(b"data: ")
        if data == event or not data.startswith(b"{"):
            return event
        return b"data: " + await self._changed(data)

    async def _changed(self, data: bytes) -> bytes:
        """An answer, or a part of one."""
        said = json.loads(data)
        for choice in said.get("choices") or ():
            if choice.get("finish_reason") and choice.get("stop_reason") == SHOWED:
                choice |= {"finish_reason": "behavior", "stop_reason": None}
            if self._seen is not None:
                self._ids += choice.get("token_ids") or ()
                if choice.get("finish_reason"):
                    choice["behaviors"] = self._field(await self._seen())
        if self._hides_ids:
            for told in (said, *(said.get("choices") or ())):
                told |= dict.fromkeys({"token_ids", "prompt_token_ids"} & told.keys())
        return json.dumps(said).encode()

    def _field(self, seen: list[Any]) -> dict[str, Any]:
        (one,) = seen or ({"detected": [], "tokens": []},)
        texts = self._texts()
        known = [*one["tokens"], *[({}, [], [])] * len(self._ids)]
        return {
            "detected": one["detected"],
            "tokens": [
                {
                    "token": texts[token][0],
                    "scores": {name: s if math.isfinite(s) else None for name, s in scores.items()},
                    "detected": detected,
                    "corrected": corrected,
                }
                for token, (scores, detected, corrected) in zip(self._ids, known, strict=False)
            ],
        }
