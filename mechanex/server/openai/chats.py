"""Chats as requests for text, whatever API they came by."""

from __future__ import annotations

from dataclasses import replace

from anyio.to_thread import run_sync
from fastapi import Request

from ...engine.chat import Chat
from ...engine.tool_calls import knows_tools
from ..accounts.auth import Principal
from ..http.errors import invalid
from ..library.watched import Watching
from ..model.engine import ServingEngine
from ..model.requests import TextRequest
from .answering import check_choices, check_model, check_room
from .asked import common_of
from .bodies import ChatBody
from .doors import about
from .sampling import truncated
from .tools import check_tools

__all__ = ["chat_ids", "chat_request"]


async def chat_ids(engine: ServingEngine, body: ChatBody) -> list[int]:
    """The token ids that a chat is read as.

    Raises:
        ValidationError: messages or tools that the model's template has no place for.
    """
    if body.offered:
        check_tools(engine)
    chat = Chat(
        [message.rendered for message in body.messages],
        continue_final_message=bool(body.continue_final_message),
        add_generation_prompt=body.add_generation_prompt,
        template_kwargs=body.chat_template_kwargs or {},
        tools=[one.rendered for one in body.offered],
    )
    if any(one.of_tools for one in body.messages) and not knows_tools(engine.tokenizer):
        raise invalid(
            f"{engine.model_name}'s chat template has no place for calls of tools and what they gave.",
            "messages",
        )
    return await run_sync(engine.encoder.encode_chat, chat)


async def chat_request(
    request: Request, engine: ServingEngine, body: ChatBody, who: Principal
) -> tuple[TextRequest, Watching]:
    """What a chat asks of the decoder, and what is watched in its answers.

    Raises:
        ValidationError: fields that can't be honoured.
        NotFoundError: another model.
    """
    check_model(engine, body.model)
    check_choices(engine, 1, body)
    if engine.settings.log_prompts:
        request.state.log = {"messages": [message.rendered for message in body.messages]}
    common, watching = await common_of(engine, body, who)
    asked = body.asked_length
    with about("messages"):
        ids = truncated(engine, body, await chat_ids(engine, body), asked)
        check_room(engine, len(ids), asked, body.length_field)
    wanted = replace(
        common,
        ids=ids,
        max_tokens=asked or (4096 if engine.context is None else engine.context - len(ids)),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )
    return wanted, watching
