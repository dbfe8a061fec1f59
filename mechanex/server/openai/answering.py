"""Answers to requests of any kind: bounds, the scheduler, and the answer as a whole or as a stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fastapi import Request
from fastapi.responses import Response

from ...engine.seeds import row_seed
from ...errors import NotFoundError
from ..http.answers import json_answer
from ..http.disconnect import done_or_gone
from ..http.errors import invalid
from ..library.watched import Watching
from ..model.engine import ServingEngine
from ..model.requests import Result, TextRequest, results_of
from .bodies import GenerationBody
from .bounds import within_bounds
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
    prompts, size = within_bounds(engine, prompts, body, watching)
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
    if reply.inside is not None:
        await done_or_gone(request, reply.inside.read_all(results))
    usage = reply.usage(results, drawn)
    kept = _best(results, n, drawn)
    return await json_answer(lambda: reply.complete(kept, usage), size + len(results))


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
