"""OpenAI's API: models, completions and chat completions, each steered as its request says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any

from anyio.to_thread import run_sync
from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from ...engine.chat import Chat
from ...engine.prompt_conditions import PromptCondition
from ...engine.sae.behavior import Behavior
from ...engine.sae.watching import forced_edits
from ...engine.sampling import Sampling, row_seed
from ...errors import NotFoundError, ValidationError
from ..accounts.auth import Principal, principal
from ..http.answers import json_answer
from ..http.disconnect import done_or_gone
from ..http.routes import Route
from ..library.watched import Watching
from ..model.engine import Engine, ServingEngine
from ..model.requests import Steer, TextRequest, results_of
from .bodies import ChatBody, CompletionBody, ConditionItem, GenerationBody
from .replies import ChatReply, CompletionReply, Reply
from .scores import Scores
from .streams import stream_response

__all__ = ["openai_router"]

Who = Annotated[Principal, Depends(principal)]


def openai_router() -> APIRouter:
    """The routes under /v1."""
    router = APIRouter(prefix="/v1", tags=["openai"], route_class=Route)
    router.add_api_route("/models", _models, methods=["GET"])
    router.add_api_route("/models/{model:path}", _model, methods=["GET"], responses=_errors(404))
    responses = _errors(400, 401, 404, 413, 429, 500, 503, 504)
    router.add_api_route("/completions", _completions, methods=["POST"], responses=responses)
    router.add_api_route("/chat/completions", _chat, methods=["POST"], responses=responses)
    return router


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"description": "An error object."} for status in statuses}


async def _models(request: Request, engine: Engine, who: Who) -> dict[str, Any]:
    """The models that are served: one."""
    return {"object": "list", "data": [_described(engine, request)]}


async def _model(model: str, request: Request, engine: Engine, who: Who) -> dict[str, Any]:
    """One model."""
    _check_model(engine, model)
    return _described(engine, request)


async def _completions(body: CompletionBody, request: Request, engine: Engine, who: Who) -> Response:
    """Continues texts."""
    _check_model(engine, body.model)
    if not body.prompts:
        raise _invalid("Invalid value for 'prompt': it is an empty list.", "prompt")
    _check_choices(engine, len(body.prompts) * body.n_answers)
    if engine.settings.log_prompts:
        request.state.log = {"prompt": body.prompt}
    common, watching = await _common(engine, body, who)
    asked = body.max_tokens if "max_tokens" in body.model_fields_set else None
    common = replace(
        common,
        max_tokens=16 if body.max_tokens is None else body.max_tokens,
        logprobs=body.logprobs,
        prompt_logprobs=bool(body.echo) and body.logprobs is not None,
    )
    prompts = [await engine.encode(prompt) for prompt in body.prompts]
    for ids in prompts:
        _check_room(engine, len(ids), asked)
    echoed: list[tuple[str, Sequence[int]]] | None = None
    if body.echo:
        echoed = []
        for prompt, ids in zip(body.prompts, prompts, strict=True):
            text = prompt if isinstance(prompt, str) else await run_sync(engine.encoder.decode, prompt)
            echoed += [(text, ids)] * body.n_answers
    reply = CompletionReply(engine.model_name, engine.token_texts, body.logprobs is not None, echoed)
    wanted = [replace(common, ids=ids) for ids in prompts]
    return await _answer(request, engine, body, reply, wanted, watching)


async def _chat(body: ChatBody, request: Request, engine: Engine, who: Who) -> Response:
    """Answers a chat."""
    _check_model(engine, body.model)
    _check_choices(engine, body.n_answers)
    messages = [message.rendered for message in body.messages]
    if engine.settings.log_prompts:
        request.state.log = {"messages": messages}
    common, watching = await _common(engine, body, who)
    chat = Chat(
        messages,
        continue_final_message=bool(body.continue_final_message),
        add_generation_prompt=body.add_generation_prompt,
        template_kwargs=body.chat_template_kwargs or {},
    )
    ids = await run_sync(engine.encoder.encode_chat, chat)
    asked = body.max_completion_tokens or body.max_tokens
    _check_room(engine, len(ids), asked or 0)
    wanted = replace(
        common,
        ids=ids,
        max_tokens=asked or (4096 if engine.context is None else max(engine.context - len(ids), 1)),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )
    reply = ChatReply(engine.model_name, engine.token_texts, bool(body.logprobs))
    return await _answer(request, engine, body, reply, [wanted], watching)


async def _answer(
    request: Request,
    engine: ServingEngine,
    body: GenerationBody,
    reply: Reply,
    prompts: list[TextRequest],
    watching: Watching,
) -> Response:
    """Asks for the answers to all prompts, and tells them as a stream or as a whole."""
    n = body.n_answers
    prompts = [_with_bounded_logprobs(engine, one, len(prompts) * n, body) for one in prompts]
    requests = [
        replace(one, seed=None if body.seed is None else row_seed(body.seed, i), onlooker=watching.onlooker())
        for one in prompts
        for i in range(n)
    ]
    generations = engine.scheduler.submit_all(requests)
    if body.behavior_scores:
        reply.scores = Scores(engine.token_texts, [one.onlooker for one in requests])
    if body.stream:
        options = body.stream_options
        ask = options is not None and bool(options.include_usage)
        response: Response = stream_response(reply, generations, n, ask)
    else:
        results = await done_or_gone(request, results_of(generations))
        response = await json_answer(lambda: reply.complete(results, n), _size(requests))
    if (quota := engine.scheduler.quota) is not None:
        response.headers.update(quota.headers(str(requests[0].owner or ""), "tokens"))
    return response


async def _common(
    engine: ServingEngine, body: GenerationBody, who: Principal
) -> tuple[TextRequest, Watching]:
    """What both kinds of request say of their answers, yet without a prompt, and what they have watched in them."""
    temperature = 1.0 if body.temperature is None else body.temperature
    top_p = 1.0 if body.top_p is None else body.top_p
    # Below a millionth only the likeliest token is left, in any precision.
    greedy = temperature < 1e-6 or top_p == 0
    sampling = Sampling("greedy") if greedy else Sampling("top-p", top_p=top_p, temperature=temperature)
    biases = tuple((int(token), bias) for token, bias in (body.logit_bias or {}).items())
    try:
        if biases:
            engine.adapter.check_token_ids(token for token, _ in biases)
    except ValidationError as error:
        raise _invalid(f"Invalid value for 'logit_bias': {error.message}", "logit_bias") from error
    steering, watching = await _steering(engine, body, who)
    common = TextRequest(
        (),
        sampling=sampling,
        stops=body.stops,
        frequency_penalty=body.frequency_penalty or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
        logit_bias=biases,
        steering=steering,
        owner=who.account_id,
        stream=bool(body.stream),
    )
    return common, watching


async def _steering(
    engine: ServingEngine, body: GenerationBody, who: Principal
) -> tuple[tuple[Steer, ...], Watching]:
    """The request's edits, in the order: the one vector, the list, the behaviors; and what it has watched."""
    vector = body.steering_vector or body.steering_vector_id
    named, forced = body.behavior_names or (), body.force_steering or ()
    corrected = body.corrected_behaviors or ()
    names = list(dict.fromkeys([*named, *forced]))
    given = body.steering_strength
    if given and vector is None and not names:
        raise _invalid(
            f"steering_strength is {given} and there is nothing to steer with: give a steering_vector.",
            "steering_strength",
        )
    strength = 1.0 if given is None else given
    found: list[Steer] = []
    steerings = engine.steerings
    param = "steering_vector"
    try:
        param = "steering_condition"
        condition = await _condition(engine, who, body.steering_condition)
        param = "steering_vector"
        found += await steerings.by_vector(who.account_id, vector, strength, condition=condition)
        param = "steering"
        for item in body.steering or ():
            found += await steerings.by_vector(
                who.account_id,
                item.vector,
                item.strength,
                layers=item.layers,
                tokens=item.selector,
                condition=await _condition(engine, who, item.condition),
            )
        watched: dict[str, Behavior] = {}
        for name in names:
            param = "behavior_names" if name in named else "force_steering"
            behavior = await _watched(engine, body, who, name)
            if behavior is None:
                beyond = steerings.beyond_corrections(name, strength)
                found += await steerings.by_behavior(who.account_id, name, beyond)
                continue
            if name in forced:
                found += forced_edits([behavior])
            if name in named:
                watched[name] = behavior
        param = "corrected_behaviors"
        more = [name for name in dict.fromkeys(corrected) if name not in watched]
        watched.update(zip(more, await steerings.watched.named(who.account_id, more), strict=True))
    except (NotFoundError, ValidationError) as error:
        raise _invalid(error.message, param) from error
    action = body.behavior_action
    found += steerings.corrections
    done = action if action is not None and action != "steer" else "correct"
    return tuple(found), Watching(tuple(watched.values()), done, steerings.floor)


async def _condition(
    engine: ServingEngine, who: Principal, item: ConditionItem | None
) -> PromptCondition | None:
    if item is None:
        return None
    return await engine.steerings.condition(who.account_id, item.vector, item.threshold, item.layer)


async def _watched(engine: ServingEngine, body: GenerationBody, who: Principal, name: str) -> Behavior | None:
    """The behavior of this name where it is to be watched; None where its vector is to be added."""
    watched = engine.steerings.watched
    action = body.behavior_action if name in (body.behavior_names or ()) else None
    if action == "steer":
        return None
    if action is not None or name in (body.corrected_behaviors or ()):
        return (await watched.named(who.account_id, [name]))[0]
    return await watched.find(who.account_id, name) if body.steering_strength is None else None


def _with_bounded_logprobs(
    engine: ServingEngine, one: TextRequest, answers: int, body: GenerationBody
) -> TextRequest:
    """The request, if its answers hold no more log-probabilities than the server tells at once.

    One that no length was asked for ends where there would be more.
    """
    if one.logprobs is None:
        return one
    most, each = engine.settings.max_logprobs, answers * (one.logprobs + 1)
    prompt = len(one.ids) if one.prompt_logprobs else 0
    if not body.asked_length:
        one = replace(one, max_tokens=min(one.max_tokens, max(1, most // each - prompt)))
    found = each * (one.max_tokens + prompt)
    if found > most:
        raise _invalid(
            f"{found} log-probabilities were asked for (answers x tokens x (top + 1)), and this server tells {most} at "
            "once: ask for fewer answers, tokens or top_logprobs.",
            "logprobs",
        )
    return one


def _size(requests: Sequence[TextRequest]) -> int:
    """About how many numbers and texts the whole answer holds."""
    return sum(one.max_tokens * (one.logprobs + 1) for one in requests if one.logprobs is not None) + len(
        requests
    )


def _described(engine: ServingEngine, request: Request) -> dict[str, Any]:
    started = int(request.app.state.started)
    return {"id": engine.model_name, "object": "model", "created": started, "owned_by": "mechanex"}


def _check_model(engine: ServingEngine, name: str | None) -> None:
    if name is not None and name != engine.model_name:
        raise NotFoundError(
            f"The model {name[:200]!r} does not exist here; this server has {engine.model_name!r}.",
            404,
            {"param": "model", "code": "model_not_found"},
        )


def _check_choices(engine: ServingEngine, n: int) -> None:
    most = engine.settings.max_choices
    if n > most:
        raise _invalid(
            f"{n} answers were asked for (prompts times n), and this server gives {most} at most.", "n"
        )


def _check_room(engine: ServingEngine, prompt: int, asked: int | None) -> None:
    """Refuses an answer that can't fit; one that no length was asked for ends with the context."""
    context, answer = engine.context, asked or 0
    if context is not None and prompt + (1 if asked is None else asked) > context:
        raise _invalid(
            f"This model's maximum context length is {context} tokens. However, you requested {prompt + answer} "
            f"tokens ({prompt} in the prompt, {answer} in the completion). Please reduce the length of either.",
            "max_tokens" if prompt < context else None,
            "context_length_exceeded",
        )


def _invalid(message: str, param: str | None, code: str | None = None) -> ValidationError:
    return ValidationError(message, 400, {"param": param, "code": code})
