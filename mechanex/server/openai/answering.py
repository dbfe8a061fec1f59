"""Answers to requests of any kind: bounds, the scheduler, and the answer as a whole or as a stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fastapi import Request
from fastapi.responses import Response

from ...engine.sampling import row_seed
from ...errors import NotFoundError
from ..http.answers import json_answer
from ..http.disconnect import done_or_gone
from ..http.errors import invalid
from ..library.watched import Watching
from ..model.engine import ServingEngine
from ..model.requests import Result, TextRequest, results_of
from .bodies import GenerationBody
from .inspection import Inspection
from .replies import Reply, Running
from .scores import Scores
from .streams import stream_response

__all__ = ["answer", "check_choices", "check_model", "check_room"]


async def answer(
    request: Request,
    engine: ServingEngine,
    body: GenerationBody,
    reply: Reply,
    prompts: list[TextRequest],
    watching: Watching,
) -> Response:
    """Asks for the answers to all prompts, and tells them as a stream or as a whole."""
    n, drawn = body.n_answers, body.n_drawn
    check_choices(engine, len(prompts), body)
    if drawn > n:
        prompts = [one if one.logprobs is not None else replace(one, logprobs=0) for one in prompts]
    prompts = [_with_bounded_logprobs(engine, one, len(prompts) * drawn, body) for one in prompts]
    requests = [
        replace(one, seed=None if body.seed is None else row_seed(body.seed, i), onlooker=watching.onlooker())
        for one in prompts
        for i in range(drawn)
    ]
    if body.returned is not None:
        reply.inside = await Inspection.of(engine, body.returned, requests, watching, drawn > n)
    generations = engine.scheduler.submit_all(requests)
    if body.return_token_ids:
        reply.prompts = [one.ids for one in requests]
    if body.behavior_scores:
        reply.scores = Scores(engine.token_texts, [one.onlooker for one in requests])
    if body.stream:
        options = body.stream_options
        ask = options is not None and bool(options.include_usage)
        if options is not None and options.continuous_usage_stats:
            reply.running = Running(requests)
        return stream_response(reply, generations, n, ask, engine.public)
    results = await done_or_gone(request, results_of(generations))
    size = _size(requests)
    if reply.inside is not None:
        await done_or_gone(request, reply.inside.read_all(results))
        size += reply.inside.size
    usage = reply.usage(results, drawn)
    kept = _best(results, n, drawn)
    return await json_answer(lambda: reply.complete(kept, usage), size)


def _best(results: Sequence[Result], n: int, drawn: int) -> list[Result]:
    """Of every ``drawn`` answers to a prompt the ``n`` likeliest ones, by the mean over their tokens."""
    if drawn == n:
        return list(results)
    kept: list[Result] = []
    for begin in range(0, len(results), drawn):
        kept += sorted(results[begin : begin + drawn], key=_likelihood, reverse=True)[:n]
    return kept


def _likelihood(result: Result) -> float:
    return sum(one.logprob for one in result.logprobs) / max(len(result.logprobs), 1)


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
    if body.asked_length is None:
        one = replace(one, max_tokens=min(one.max_tokens, max(1, most // each - prompt)))
    found = each * (one.max_tokens + prompt)
    if found > most:
        raise invalid(
            f"{found} log-probabilities were asked for (answers x tokens x (top + 1)), and this server tells {most} at "
            "once: ask for fewer answers, tokens or top_logprobs.",
            "logprobs",
        )
    return one


def _size(requests: Sequence[TextRequest]) -> int:
    """About how many numbers and texts the whole answer holds."""
    asked = [one for one in requests if one.logprobs is not None]
    lengths = [one.max_tokens + (len(one.ids) if one.prompt_logprobs else 0) for one in asked]
    tops = [(one.logprobs or 0) + 1 for one in asked]
    return sum(length * top for length, top in zip(lengths, tops, strict=True)) + len(requests)


def check_model(engine: ServingEngine, name: str | None) -> None:
    if name is not None and name != engine.model_name:
        raise NotFoundError(
            f"The model {name[:200]!r} does not exist here; this server has {engine.model_name!r}.",
            404,
            {"param": "model", "code": "model_not_found"},
        )


def check_choices(engine: ServingEngine, prompts: int, body: GenerationBody) -> None:
    """Refuses more answers than the server gives at once."""
    most, each = engine.settings.max_choices, body.n_drawn
    if prompts * each > most:
        raise invalid(
            f"{prompts * each} answers were asked for, {each} to each of {prompts} prompts, and this server gives "
            f"{most} at most.",
            "prompt" if each == 1 else "n" if each == body.n else "best_of",
        )


def check_room(engine: ServingEngine, prompt: int, asked: int | None, param: str | None = None) -> None:
    """Refuses an answer that can't fit.

    Args:
        engine: whose context it is.
        prompt: tokens.
        asked: tokens of the answer; None for as many as there is room for, which is one at least.
        param: the field that asks for them.
    """
    context, answer = engine.context, 1 if asked is None else asked
    if context is None or prompt + answer <= context:
        return
    told = f"you requested {prompt + answer} tokens ({prompt} in the prompt, {answer} in the completion)"
    raise invalid(
        f"This model's maximum context length is {context} tokens. However, "
        + (
            f"{told}. Please reduce the length of either."
            if answer
            else f"the prompt has {prompt}: shorten it."
        ),
        param if prompt < context and asked else None,
        "context_length_exceeded",
    )
