"""OpenAI's Responses API: texts, as a whole or as a stream. Nothing is kept between requests."""

from __future__ import annotations

import random
import time
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import Field, field_validator, model_validator

from ...errors import MechanexError
from ..http.body import Items, Part, refused
from ..http.errors import error_envelope
from ..model.engine import Engine
from ..model.requests import Result
from ..model.rules import Whole
from .bodies import ChatBody, SteeringFields, chat_of, text_of
from .chats import chat_request
from .doors import Who, posts, sent_as
from .sampling import IgnoredFields
from .single import Event, answer_single

__all__ = ["responses_router"]

_NAMES = {"messages": "input", "max_completion_tokens": "max_output_tokens", "response_format": "text"}


class _InputText(Part):
    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: list[Any] | None = Field(default=None, max_length=0)
    logprobs: list[Any] | None = None


class _InputMessage(Part):
    type: Literal["message"] | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[Items[_InputText], Field(max_length=1024)]
    # What an answer of ours has when it is sent back.
    id: str | None = None
    status: str | None = None
    phase: str | None = None


class _Format(Part):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None

    @model_validator(mode="after")
    def _with_schema(self) -> _Format:
        if (self.type == "json_schema") != (self.schema_ is not None):
            raise refused("schema", "a schema goes with type 'json_schema', and that with it")
        return self

    @property
    def of_chats(self) -> dict[str, Any]:
        """The same as chats have it."""
        named = {} if self.schema_ is None else {"json_schema": {"name": self.name, "schema": self.schema_}}
        return {"type": self.type, **named}


class _TextField(Part):
    format: _Format | None = None
    verbosity: str | None = None


class ResponsesBody(IgnoredFields, SteeringFields):
    """POST /v1/responses."""

    model: str | None = None
    input: str | Annotated[Items[_InputMessage], Field(min_length=1, max_length=4096)]
    instructions: str | None = None
    max_output_tokens: Whole | None = Field(default=None, ge=1, le=2**31)
    temperature: float | None = Field(default=1.0, ge=0, le=2)
    top_p: float | None = Field(default=1.0, ge=0, le=1)
    stream: bool | None = False
    stream_options: dict[str, Any] | None = None
    text: _TextField | None = None
    tools: list[Any] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    background: bool | None = None
    truncation: Literal["disabled"] | None = None
    reasoning: dict[str, Any] | None = Field(default=None, description="Changes nothing.")
    include: Annotated[list[Any], Field(max_length=0)] | None = None

    @field_validator("tools")
    @classmethod
    def _no_tools(cls, tools: list[Any] | None) -> list[Any] | None:
        if tools:
            raise ValueError(
                "no tools here: /v1/chat/completions takes functions where the model's template does"
            )
        return tools

    @model_validator(mode="after")
    def _stateless(self) -> ResponsesBody:
        for name in ("previous_response_id", "conversation"):
            if getattr(self, name) is not None:
                raise refused(
                    name,
                    f"{name} is not supported, since nothing is kept here: send the earlier messages in input",
                )
        if self.background:
            raise refused(
                "background", "background is not supported: answers are given to the request that asks"
            )
        return self

    def as_chat(self) -> ChatBody:
        """The same as a chat completion."""
        messages: list[dict[str, Any]] = []
        if self.instructions:
            messages.append({"role": "system", "content": self.instructions})
        if isinstance(self.input, str):
            messages.append({"role": "user", "content": self.input})
        else:
            messages += [{"role": one.role, "content": text_of(one.content)} for one in self.input]
        fields: dict[str, Any] = {
            "messages": messages,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "stream": self.stream,
        }
        if self.text is not None and self.text.format is not None:
            fields["response_format"] = self.text.format.of_chats
        return chat_of(self, {**fields, "max_completion_tokens": self.max_output_tokens}, _NAMES)


def responses_router() -> APIRouter:
    """The route."""
    return posts("openai", {"/responses": _responses})


async def _responses(body: ResponsesBody, request: Request, engine: Engine, who: Who) -> Response:
    """Answers messages."""
    chat = body.as_chat()
    with sent_as(_NAMES):
        wanted, watching = await chat_request(request, engine, chat, who)
    shape = _ResponseShape(engine.model_name, body)
    return await answer_single(request, engine, wanted, watching, shape, stream=bool(body.stream))


class _ResponseShape:
    def __init__(self, model: str, body: ResponsesBody) -> None:
        self._model, self._body = model, body
        self._id, self._item_id = (f"{kind}_{random.getrandbits(128):032x}" for kind in ("resp", "msg"))
        self._created = int(time.time())
        self._number = 0

    def whole(self, result: Result) -> dict[str, Any]:
        cut = result.finish_reason == "length"
        status = "incomplete" if cut else "completed"
        usage = {
            "input_tokens": result.prompt_tokens,
            "input_tokens_details": {"cached_tokens": result.cached_tokens},
            "output_tokens": result.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": result.prompt_tokens + result.completion_tokens,
        }
        details = {"reason": "max_output_tokens"} if cut else None
        return self._response(status, [self._item(status, [_part(result.text)])], usage, details)

    def begin(self) -> list[Event]:
        empty = self._response("in_progress", [], None)
        return [
            self._event("response.created", response=empty),
            self._event("response.in_progress", response=empty),
            self._event("response.output_item.added", output_index=0, item=self._item("in_progress", [])),
            self._event("response.content_part.added", **self._place, part=_part("")),
        ]

    def more(self, text: str) -> list[Event]:
        return [self._event("response.output_text.delta", **self._place, delta=text, logprobs=[])]

    def end(self, result: Result) -> list[Event]:
        whole = self.whole(result)
        name = f"response.{whole['status']}"
        return [
            self._event("response.output_text.done", **self._place, text=result.text, logprobs=[]),
            self._event("response.content_part.done", **self._place, part=_part(result.text)),
            self._event("response.output_item.done", output_index=0, item=whole["output"][0]),
            self._event(name, response=whole),
        ]

    def failed(self, error: MechanexError) -> list[Event]:
        told = error_envelope(error)["error"]
        return [self._event("error", code=told["code"], message=told["message"], param=told["param"])]

    @property
    def _place(self) -> dict[str, Any]:
        return {"item_id": self._item_id, "output_index": 0, "content_index": 0}

    def _format(self) -> dict[str, Any]:
        text = self._body.text
        if text is None or text.format is None:
            return {"type": "text"}
        return text.format.model_dump(by_alias=True, exclude_none=True)

    def _event(self, name: str, **fields: Any) -> Event:
        number, self._number = self._number, self._number + 1
        return name, {"type": name, "sequence_number": number, **fields}

    def _item(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._item_id,
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": content,
        }

    def _response(
        self, status: str, output: list[dict[str, Any]], usage: dict[str, Any] | None, details: Any = None
    ) -> dict[str, Any]:
        body = self._body
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": details,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": self._model,
            "output": output,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "store": False,
            "temperature": body.temperature,
            "text": {"format": self._format()},
            "tool_choice": body.tool_choice or "auto",
            "tools": [],
            "top_p": body.top_p,
            "truncation": "disabled",
            "usage": usage,
        }


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
