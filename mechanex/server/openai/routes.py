"""OpenAI's API: models, completions and chat completions, each steered as its request says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from anyio.to_thread import run_sync
from fastapi import APIRouter, Request
from fastapi.responses import Response

from ...errors import ValidationError
from ..http.errors import invalid
from ..model.engine import Engine, ServingEngine
from .answering import answer, check_choices, check_model, check_room
from .asked import common_of
from .bodies import ChatBody, CompletionBody
from .chats import chat_request
from .doors import Who, about, errors, posts
from .replies import ChatReply, CompletionReply
from .sampling import truncated
from .tools import reader_of

__all__ = ["openai_router"]


def openai_router() -> APIRouter:
    """The routes under /v1."""
    router = posts("openai", {"/completions": _completions, "/chat/completions": _chat})
    router.add_api_route("/models", _models, methods=["GET"])
    router.add_api_route("/models/{model:path}", _model, methods=["GET"], responses=errors(404))
    return router


async def _models(request: Request, engine: Engine, who: Who) -> dict[str, Any]:
    """The models that are served: one."""
    return {"object": "list", "data": [_described(engine, request)]}


async def _model(model: str, request: Request, engine: Engine, who: Who) -> dict[str, Any]:
    """One model."""
    check_model(engine, model)
    return _described(engine, request)


async def _completions(body: CompletionBody, request: Request, engine: Engine, who: Who) -> Response:
    """Continues texts."""
    check_model(engine, body.model)
    if not body.prompts:
        raise invalid("Invalid value for 'prompt': it is an empty list.", "prompt")
    check_choices(engine, len(body.prompts), body)
    if engine.settings.log_prompts:
        request.state.log = {"prompt": body.prompt}
    common, watching = await common_of(engine, body, who)
    asked = body.asked_length
    common = replace(
        common,
        max_tokens=body.most_tokens,
        logprobs=body.logprobs,
        prompt_logprobs=bool(body.echo) and body.logprobs is not None,
    )
    with about("prompt"):
        prompts = [truncated(engine, body, await engine.encode(prompt), asked) for prompt in body.prompts]
        for ids in prompts:
            if not ids:
                raise ValidationError("Invalid value for 'prompt': a prompt has no tokens.")
            check_room(engine, len(ids), asked, body.length_field)
    echoed: list[tuple[str, Sequence[int]]] | None = None
    if body.echo:
        echoed = []
        for prompt, ids in zip(body.prompts, prompts, strict=True):
            whole = isinstance(prompt, str) and body.truncate_prompt_tokens is None
            text = str(prompt) if whole else await run_sync(engine.encoder.decode, ids)
            # Of a character that the prompt has only begun, the answer has the whole.
            text = text if whole else text.removesuffix("\ufffd")
            echoed += [(text, ids)] * body.n_answers
    reply = CompletionReply(engine.model_name, engine.token_texts, body.logprobs is not None, echoed)
    wanted = [replace(common, ids=ids) for ids in prompts]
    return await answer(request, engine, body, reply, wanted, watching)


async def _chat(body: ChatBody, request: Request, engine: Engine, who: Who) -> Response:
    """Answers a chat."""
    calls = reader_of(engine, body.offered, body.tool_choice) if body.offered else None
    wanted, watching = await chat_request(request, engine, body, who)
    reply = ChatReply(engine.model_name, engine.token_texts, bool(body.logprobs), calls)
    return await answer(request, engine, body, reply, [wanted], watching)


def _described(engine: ServingEngine, request: Request) -> dict[str, Any]:
    started = int(request.app.state.started)
    return {
        "id": engine.model_name,
        "object": "model",
        "created": started,
        "owned_by": "mechanex",
        "max_model_len": engine.context,
    }
