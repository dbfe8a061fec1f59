"""Behaviors of the Axionic API: made, listed and deleted, and text that is written while they are watched."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from ...engine.sae.create import LEAST_EXAMPLES, create
from ...engine.sae.watching import forced_edits
from ...engine.sampling import Sampling
from ...errors import ValidationError
from ..accounts.auth import Principal
from ..accounts.store import store_of
from ..http.answers import MOST_NUMBERS, json_answer
from ..http.disconnect import done_or_gone
from ..http.routes import Route
from ..library.kept import KeptBehavior
from ..library.threads import run_sync
from ..library.watched import Watching
from ..model.engine import Engine, ServingEngine
from ..model.requests import TextRequest, results_of, trace_of
from ..model.rules import held_to
from .accounts import shown
from .bodies import BehaviorBody, SaeBody
from .guards import Sender, Worker
from .work import ReadableExamples, computed, done, examples_of, stops_of

if TYPE_CHECKING:
    from ...engine.sae.behavior import Behavior
    from ...engine.vectors import SteeringVector

__all__ = ["router"]

router = APIRouter(tags=["axionic"], route_class=Route)


@router.post("/behaviors/create")
async def create_behavior(
    body: BehaviorBody, request: Request, engine: Engine, who: Worker
) -> dict[str, Any]:
    """Keeps a behavior: what watches for it, and a vector, which is computed where no id of one is given.

    Of fewer than four examples, which can't be held out to measure anything, there is the vector alone.
    """
    library = store_of(request).library
    if body.behavior_name in engine.steerings.own_behaviors:
        raise ValidationError(
            f"the behavior {body.behavior_name!r} is the server's own, and every client may use it: choose another "
            "name."
        )
    await run_sync(library.check_name, who.account_id, body.behavior_name)
    examples = await examples_of(engine, body)
    given, owned = None, False
    if body.steering_vector_id is not None:
        owned = await run_sync(library.vector, who.account_id, body.steering_vector_id) is not None
        given = await engine.steerings.vector(who.account_id, body.steering_vector_id)
    behavior = None
    if len(body.prompts) >= LEAST_EXAMPLES:
        behavior = await _behavior(request, engine, who, body, examples, given)
    vector: SteeringVector | str
    if given is None:
        vector = await computed(request, engine, who, examples, None, "caa")
    elif owned:
        vector = str(body.steering_vector_id)
    else:
        # One of the operator's: the account keeps a copy, which stays when the operator's goes.
        vector = given
    made = await run_sync(
        library.add_behavior,
        who.account_id,
        body.behavior_name,
        body.description,
        examples.lists,
        vector,
        behavior,
    )
    return _told(engine, made)


@router.get("/behaviors")
async def behaviors(request: Request, engine: Engine, who: Sender) -> list[dict[str, Any]]:
    """The account's behaviors, oldest first."""
    found = await run_sync(store_of(request).library.behaviors, who.account_id)
    return [_told(engine, one) for one in found]


def _told(engine: ServingEngine, behavior: KeptBehavior) -> dict[str, Any]:
    """What answers have of a behavior: its model by the name that clients see."""
    found = shown(behavior)
    return found | {"model": engine.public(found["model"])} if found.get("model") else found


@router.delete("/behaviors/{behavior_name:path}", status_code=204, response_class=Response)
async def delete_behavior(behavior_name: str, request: Request, who: Sender) -> None:
    """Deletes a behavior; its steering vector stays."""
    await run_sync(store_of(request).library.delete_behavior, who.account_id, behavior_name)


@router.post("/sae/generate")
async def sae_generate(body: SaeBody, request: Request, engine: Engine, who: Worker) -> Response:
    """Continues a prompt while behaviors are watched; ``text`` is the prompt with its continuation.

    Without ``behavior_names`` all that the account made for this model are watched; what the server corrects in every
    answer is corrected in these too.
    """
    steerings, names = engine.steerings, body.behavior_names
    behaviors = await (
        steerings.watched.every(who.account_id)
        if names is None
        else steerings.watched.named(who.account_id, names)
    )
    forced = await steerings.watched.named(who.account_id, body.force_steering or ())
    edits = forced_edits(forced) + steerings.corrections
    onlooker = Watching(behaviors, body.action, steerings.floor).onlooker()
    asked = TextRequest(
        await engine.encode(body.prompt),
        max_tokens=body.max_new_tokens,
        sampling=Sampling(**body.sampling),
        seed=body.seed,
        stops=stops_of(body.stop),
        steering=edits,
        owner=who.account_id,
        onlooker=onlooker,
    )
    n_scores = (len(behaviors) + len(steerings.floor)) * asked.max_tokens if body.return_trace else 0
    if n_scores > MOST_NUMBERS:
        raise ValidationError(
            f"{n_scores} scores were asked for (behaviors x max_new_tokens), and this server tells {MOST_NUMBERS} at "
            "once: name fewer behaviors, ask for fewer tokens, or leave return_trace out."
        )
    generation = engine.scheduler.submit(await held_to(engine, body, asked))
    (result,) = await done_or_gone(request, results_of([generation]))
    told: dict[str, Any] = {
        "text": await engine.text(body.prompt) + result.text,
        "finish_reason": result.finish_reason,
        "detected": list(onlooker.detected) if onlooker is not None else [],
    }
    if not body.return_trace:
        return await json_answer(lambda: told, 0)

    def with_trace() -> dict[str, Any]:
        texts = [engine.token_texts[token][0] for token in result.tokens]
        return told | {"trace": [asdict(token) for token in trace_of(result, texts, onlooker)]}

    return await json_answer(with_trace, len(result.tokens) * (len(behaviors) + 4))


async def _behavior(
    request: Request,
    engine: ServingEngine,
    who: Principal,
    body: BehaviorBody,
    examples: ReadableExamples,
    vector: SteeringVector | None,
) -> Behavior:
    """What ``sae.create_behavior`` of a local client makes."""
    await run_sync(store_of(request).library.check_room, who.account_id)
    source, sae = await engine.autoencoder() or (None, None)
    prompts, positive, negative = examples.lists.values()
    work = partial(
        create,
        name=body.behavior_name,
        prompts=prompts,
        positive_answers=positive,
        negative_answers=negative,
        sae=sae,
        source=source,
        description=body.description,
        vector=vector,
        steering_vector_id=body.steering_vector_id,
        tokenizer=engine.tokenizer,
    )
    return await done(request, engine, who, work, examples.n_tokens)
