"""Anthropic's Messages API: a chat, its answer as a whole or as a stream, and the count of its tokens."""

from __future__ import annotations

import random
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import Field

from ...errors import MechanexError
from ..http.body import Body, Items, Part
from ..http.errors import anthropic_envelope
from ..model.engine import Engine
from ..model.requests import Result
from ..model.rules import Stop, Whole
from .answering import check_model
from .bodies import ChatBody, SteeringFields, chat_of, text_of
from .chats import chat_ids, chat_request
from .doors import Who, posts, sent_as
from .single import Event, answer_single

__all__ = ["messages_router"]

_NAMES = {"stop": "stop_sequences"}


class _TextBlock(Part):
    type: Literal["text"]
    text: str
    cache_control: dict[str, Any] | None = None
    citations: None = None


class _Turn(Part):
    role: Literal["user", "assistant", "system"]
    content: str | Annotated[Items[_TextBlock], Field(max_length=1024)]


class _Thinking(Part):
    type: Literal["disabled"]


class _Metadata(Part):
    user_id: str | None = None


class CountBody(Body):
    """POST /v1/messages/count_tokens."""

    model: str | None = None
    messages: Items[_Turn] = Field(min_length=1, max_length=4096)
    system: str | Annotated[Items[_TextBlock], Field(max_length=1024)] | None = None
    thinking: _Thinking | None = Field(default=None, description="Only disabled: no reasoning is told apart.")

    @property
    def chat(self) -> list[dict[str, Any]]:
        """The messages as chat templates take them."""
        system = [] if not self.system else [{"role": "system", "content": text_of(self.system)}]
        return [*system, *({"role": one.role, "content": text_of(one.content)} for one in self.messages)]

    @property
    def goes_on(self) -> bool:
        """Whether the answer goes on with the last message."""
        return self.messages[-1].role == "assistant"


class MessagesBody(CountBody, SteeringFields):
    """POST /v1/messages."""

    max_tokens: Whole = Field(ge=1, le=2**31)
    stop_sequences: Annotated[Items[Stop], Field(max_length=16)] | None = None
    stream: bool | None = False
    temperature: float | None = Field(default=1.0, ge=0, le=2)
    top_p: float | None = Field(default=None, ge=0, le=1)
    top_k: Whole | None = Field(default=None, ge=0)
    metadata: _Metadata | None = None
    service_tier: str | None = None

    def as_chat(self) -> ChatBody:
        """The same as OpenAI's clients ask for it."""
        same = ("temperature", "top_p", "top_k", "stream", "max_tokens")
        return chat_of(
            self,
            {name: value for name in same if (value := getattr(self, name)) is not None}
            | {
                "messages": self.chat,
                "stop": self.stop_sequences or None,
                "continue_final_message": self.goes_on,
            },
            _NAMES,
        )


def messages_router() -> APIRouter:
    """The routes."""
    return posts("anthropic", {"/messages": _messages, "/messages/count_tokens": _count})


async def _messages(body: MessagesBody, request: Request, engine: Engine, who: Who) -> Response:
    """Answers a chat."""
    chat = body.as_chat()
    with sent_as(_NAMES):
        wanted, watching = await chat_request(request, engine, chat, who)
    shape = _MessageShape(engine.model_name, len(wanted.ids))
    return await answer_single(request, engine, wanted, watching, shape, stream=bool(body.stream))


async def _count(body: CountBody, engine: Engine, who: Who) -> dict[str, int]:
    """How many tokens a chat is read as."""
    check_model(engine, body.model)
    chat = chat_of(body, {"messages": body.chat, "continue_final_message": body.goes_on})
    return {"input_tokens": len(await chat_ids(engine, chat))}


class _MessageShape:
    def __init__(self, model: str, n_prompt: int) -> None:
        self._model, self._n_prompt = model, n_prompt
        self._id = f"msg_{random.getrandbits(128):032x}"

    def whole(self, result: Result) -> dict[str, Any]:
        return self._message([{"type": "text", "text": result.text}], *_reason(result), self._usage(result))

    def begin(self) -> list[Event]:
        usage = {"input_tokens": self._n_prompt, "output_tokens": 0}
        block = {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
        return [
            (
                "message_start",
                {"type": "message_start", "message": self._message([], None, None, usage)},
            ),
            ("content_block_start", block),
        ]

    def more(self, text: str) -> list[Event]:
        delta = {"type": "text_delta", "text": text}
        return [("content_block_delta", {"type": "content_block_delta", "index": 0, "delta": delta})]

    def end(self, result: Result) -> list[Event]:
        reason, stop = _reason(result)
        return [
            ("content_block_stop", {"type": "content_block_stop", "index": 0}),
            (
                "message_delta",
                {
                    "type": "message_delta",
                    "delta": {"stop_reason": reason, "stop_sequence": stop},
                    "usage": self._usage(result),
                },
            ),
            ("message_stop", {"type": "message_stop"}),
        ]

    def failed(self, error: MechanexError) -> list[Event]:
        return [("error", anthropic_envelope(error))]

    def _message(
        self, content: list[dict[str, Any]], reason: str | None, stop: str | None, usage: dict[str, int]
    ) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": content,
            "stop_reason": reason,
            "stop_sequence": stop,
            "usage": usage,
        }

    def _usage(self, result: Result) -> dict[str, int]:
        return {
            "input_tokens": result.prompt_tokens - result.cached_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": result.cached_tokens,
            "output_tokens": result.completion_tokens,
        }


def _reason(result: Result) -> tuple[str, str | None]:
    if isinstance(result.stop, str):
        return "stop_sequence", result.stop
    return {"stop": "end_turn", "length": "max_tokens", "behavior": "refusal"}[result.finish_reason], None
