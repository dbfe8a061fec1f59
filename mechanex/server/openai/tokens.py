"""Texts to tokens and back, as vLLM's servers have it: ``/tokenize`` and ``/detokenize``."""

from __future__ import annotations

from typing import Annotated, Any

from anyio.to_thread import run_sync
from fastapi import APIRouter
from pydantic import Field, model_validator

from ..http.body import Body, Items, few_fields, refused
from ..model.engine import Engine
from ..model.rules import TokenIds
from .answering import check_model
from .bodies import Message, chat_of
from .chats import chat_ids
from .doors import Who, about, posts
from .tools import Tool

__all__ = ["tokens_router"]


class TokenizeBody(Body):
    """POST /tokenize: a text, or a chat."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[Items[Message], Field(min_length=1, max_length=4096)] | None = None
    add_special_tokens: bool | None = Field(
        default=True,
        description="Whether a text gets what the tokenizer adds; a chat's template decides itself.",
    )
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = False
    chat_template_kwargs: Annotated[dict[str, Any], few_fields()] | None = None
    tools: Annotated[Items[Tool], Field(max_length=128)] | None = None
    return_token_strs: bool | None = False

    @model_validator(mode="after")
    def _one(self) -> TokenizeBody:
        if (self.prompt is None) == (self.messages is None):
            raise refused("prompt", "give a prompt, a text, or messages, a chat; one of them")
        return self


_OF_CHATS = ("messages", "tools", "continue_final_message", "add_generation_prompt", "chat_template_kwargs")


class DetokenizeBody(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: TokenIds


def tokens_router() -> APIRouter:
    """The routes beside /v1."""
    return posts("openai", {"/tokenize": _tokenize, "/detokenize": _detokenize}, prefix="")


async def _tokenize(body: TokenizeBody, engine: Engine, who: Who) -> dict[str, Any]:
    """The token ids that a prompt is read as."""
    check_model(engine, body.model)
    with about("prompt" if body.messages is None else "messages"):
        if body.messages is not None:
            ids = await chat_ids(engine, chat_of(body, {name: getattr(body, name) for name in _OF_CHATS}))
        elif body.add_special_tokens is False:
            ids = await run_sync(engine.encoder.encode_bare, body.prompt or "")
        else:
            ids = await engine.encode(body.prompt or "")
    strings = [engine.token_texts[token][0] for token in ids] if body.return_token_strs else None
    return {"count": len(ids), "max_model_len": engine.context, "tokens": ids, "token_strs": strings}


async def _detokenize(body: DetokenizeBody, engine: Engine, who: Who) -> dict[str, Any]:
    """The text of token ids, special tokens written out."""
    check_model(engine, body.model)
    with about("tokens"):
        engine.adapter.check_token_ids(body.tokens)
    return {"prompt": await run_sync(engine.encoder.decode_whole, body.tokens)}
