"""What the playground asks beside the public APIs: what there is to steer with, a vector's file, what steering does."""

from __future__ import annotations

import codecs
import re
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anyio.to_thread import run_sync
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from ...engine.chat import Chat, has_chat_template
from ...engine.decode.request import Steer
from ...engine.hooks import Intervention
from ...engine.token_shifts import Likeliest, TokenShift, token_shifts
from ...engine.token_texts import TokenTexts
from ...errors import NotFoundError
from ..accounts.scopes import may
from ..accounts.store import store_of
from ..axionic.guards import Sender, Worker
from ..axionic.work import check_count, done
from ..http.answers import json_answer
from ..http.disconnect import done_or_gone
from ..http.routes import Route
from ..library.threads import look_up
from ..model.engine import Engine, ServingEngine
from .bodies import CompareBody, SweepBody
from .files import files_router
from .sweep import swept

if TYPE_CHECKING:
    from ...engine.models.adapter import ModelAdapter
    from ...engine.pack import Pair
    from ...engine.vectors import SteeringVector

__all__ = ["MOST_TOKENS", "page_router"]

MOST_TOKENS = 2**18
"""Tokens that a sweep may read: those of its texts at every setting."""

router = APIRouter(prefix="/page", tags=["playground"], route_class=Route)


def page_router() -> APIRouter:
    """The playground at ``/``, its files and its calls."""
    whole = APIRouter()
    whole.include_router(files_router())
    whole.include_router(router)
    return whole


@router.get("/about")
async def about(request: Request, engine: Engine, who: Sender) -> dict[str, Any]:
    """The model, and the vectors and behaviors that the sender may use.

    What an account has made is listed to those who may list it elsewhere; keys for texts alone see the server's own.
    """
    steerings = engine.steerings
    if await may(request, who, "vectors"):
        found = await steerings.listed(who.account_id)
        watched = await steerings.watched.watchable(who.account_id)
    else:
        found, watched = steerings.own_vectors(), tuple(steerings.watched.own.values())
    return {
        "model": engine.model_name,
        "layers": engine.adapter.n_layers,
        "context": engine.context,
        "chat": has_chat_template(engine.tokenizer),
        "vectors": [
            {
                "id": one.vector_id,
                "names": one.names,
                "owner": one.owner,
                "layers": list(one.vector.layers),
                "norms": [round(norm, 4) for norm in one.vector.norms().values()],
                "method": one.vector.method,
                "calibrated": None if one.vector.calibration is None else one.vector.calibration.strength,
            }
            for one in found
        ],
        "behaviors": [{"name": one.name, "threshold": one.threshold} for one in watched],
    }


@router.get("/vectors/{vector_id:path}", response_class=Response)
async def vector_file(vector_id: str, request: Request, engine: Engine, who: Sender) -> Response:
    """The file of a vector that is the sender's own; the operator's are all that the server has."""
    library = store_of(request).library
    if who.account_id is not None and await look_up(library.vector, who.account_id, vector_id) is None:
        raise NotFoundError(f"no steering vector of this account has the id {vector_id[:200]!r}.")
    vector = await engine.steerings.vector(who.account_id, vector_id)
    name = re.sub(r"[^A-Za-z0-9_-]+", "_", vector_id)[:100] or "vector"
    return Response(
        await run_sync(_written, vector),
        media_type="application/octet-stream",
        headers={
            "Content-Disposition": f'attachment; filename="{name}.safetensors"',
            "Cache-Control": "no-store",
        },
    )


@router.post("/compare")
async def compare(body: CompareBody, request: Request, engine: Engine, who: Worker) -> Response:
    """For every token of given answers: how far steering moves its distribution, and the likeliest on both sides."""
    steers: list[Steer] = []
    for item in body.steering:
        steers += await engine.steerings.by_vector(
            who.account_id, item.vector, item.strength, layers=item.layers, tokens=item.selector
        )
    before = interventions(engine.steerings.corrections)
    after = [*interventions(steers), *before]
    ids = await prompt_ids(engine, body.asked)
    wanted = [i for i, answer in enumerate(body.answers) if answer]
    pairs = [await run_sync(engine.encoder.pair, ids, body.answers[i]) for i in wanted]

    engine.scheduler.take_tokens(2 * sum(len(prompt) + len(answer) for prompt, answer in pairs))

    work = partial(_shifts, pairs=pairs, steered=after, plain=before, top=body.top)
    # As short as the writing of an answer, so that it needs no place of its own.
    found = dict(zip(wanted, await done_or_gone(request, engine.scheduler.run(work)), strict=True))

    def told() -> dict[str, Any]:
        return {"answers": [_told(engine.token_texts, found.get(i, ())) for i in range(len(body.answers))]}

    return await json_answer(told, (4 * body.top + 7) * sum(len(shifts) for shifts in found.values()))


@router.post("/sweep")
async def sweep(body: SweepBody, request: Request, engine: Engine, who: Worker) -> JSONResponse:
    """A vector's effect and price at several strengths, over one answer and, where given, contrastive examples."""
    vector = await engine.steerings.vector(who.account_id, body.vector)
    pairs = [await run_sync(engine.encoder.pair, await prompt_ids(engine, body.asked), body.answer)]
    examples: list[Pair] = []
    if body.examples is not None:
        given = body.examples
        for answers in (given.positive_answers, given.negative_answers):
            for prompt, answer in zip(given.prompts, answers, strict=True):
                examples.append(await run_sync(engine.encoder.pair, prompt, answer))
    layers: list[int | None] = [None]
    if body.by_layer and len(vector) > 1:
        layers += vector.layers[: engine.settings.max_example_layers]
    n_tokens = len(layers) * len(body.strengths) * sum(len(a) + len(b) for a, b in [*pairs, *examples])
    check_count(n_tokens, MOST_TOKENS, "tokens to read")
    before = interventions(engine.steerings.corrections)

    work = partial(
        swept,
        vector=vector,
        strengths=body.strengths,
        layers=layers,
        answers=pairs,
        examples=examples,
        before=before,
    )
    return JSONResponse({"lines": await done(request, engine, who, work, n_tokens)})


def _shifts(
    adapter: ModelAdapter,
    pairs: Sequence[Pair],
    steered: Sequence[Intervention],
    plain: Sequence[Intervention],
    top: int,
) -> list[list[TokenShift]]:
    return token_shifts(adapter, pairs, steered, plain=plain, top=top) if pairs else []


def interventions(steers: Sequence[Steer]) -> list[Intervention]:
    """Edits of a request as edits of a whole pass."""
    return [
        Intervention(one.layer, one.made(), one.tokens, varying=one.varying, condition=one.condition)
        for one in steers
    ]


async def prompt_ids(engine: ServingEngine, prompt: Any) -> list[int]:
    """Token ids of a prompt as the public APIs read it."""
    if isinstance(prompt, Chat):
        return await run_sync(engine.encoder.encode_chat, prompt)
    return await engine.encode(prompt)


def _written(vector: SteeringVector) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vector.safetensors"
        vector.save(path)
        return path.read_bytes()


def _told(texts: TokenTexts, shifts: Sequence[TokenShift]) -> list[dict[str, Any]]:
    """The tokens of one answer; ``text`` is what each adds to it: a character of several tokens comes with the last."""
    characters = codecs.getincrementaldecoder("utf-8")("replace")

    def named(likeliest: Likeliest) -> list[Any]:
        return [[texts[token][0], round(logprob, 4)] for token, logprob in likeliest]

    return [
        {
            "token": texts[shift.token][0],
            "text": characters.decode(texts[shift.token][1]),
            "kl": round(shift.kl, 5),
            "logprobs": [round(shift.plain, 4), round(shift.steered, 4)],
            "plain": named(shift.plain_top),
            "steered": named(shift.steered_top),
        }
        for shift in shifts
    ]
