"""The Axionic API: generation, steering vectors and behaviors of accounts, under the paths of its HTTP contract."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from anyio.to_thread import run_sync
from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response

from ...engine.methods import check_method, vectors_by
from ...engine.sae.create import LEAST_EXAMPLES, create
from ...engine.sae.watching import forced_edits
from ...engine.sampling import Sampling
from ...errors import APIError, ValidationError
from ..accounts.auth import Principal
from ..accounts.store import store_of
from ..http.disconnect import done_or_gone
from ..library.watched import Watching
from ..model.engine import Engine, ServingEngine
from ..model.requests import TextRequest, results_of, trace_of
from . import accounts
from .accounts import shown
from .bodies import (
    BehaviorBody,
    GenerateBody,
    Output,
    RaagBody,
    Reason,
    SaeBody,
    ScoresBody,
    SteeringBody,
)
from .guards import Sender, guards_of

if TYPE_CHECKING:
    from ...engine.models.adapter import ModelAdapter
    from ...engine.sae.behavior import Behavior
    from ...engine.vectors import SteeringVector

__all__ = ["axionic_router"]

T = TypeVar("T")

router = APIRouter(tags=["axionic"])


def axionic_router() -> APIRouter:
    """Every call of the HTTP contract of the Axionic API; see ``docs/serving.md``."""
    statuses = (400, 401, 403, 404, 413, 429, 500, 503, 504, 507)
    whole = APIRouter(
        responses={status: {"model": Reason, "description": "An error."} for status in statuses}
    )
    whole.include_router(accounts.router)
    whole.include_router(router)
    return whole


async def _worker(request: Request, engine: Engine, who: Sender) -> Principal:
    """The sender of a request for the model: one whose account didn't ask for another model."""
    if who.account_id is not None:
        chosen = (await run_sync(store_of(request).users.get, who.account_id)).model_name
        served = engine.model_name
        if chosen is not None and chosen != served:
            raise ValidationError(
                f"this account chose the model {chosen!r}, and this server runs {served!r} now: choose it with "
                "POST /auth/api-keys/set-model, or use another server."
            )
    return who


Worker = Annotated[Principal, Depends(_worker)]


@router.get("/models")
async def models(engine: Engine, who: Sender) -> dict[str, Any]:
    """The models that the server runs: one."""
    return {"models": [{"name": engine.model_name}]}


@router.post("/generate", responses={200: {"model": Output}})
async def generate(body: GenerateBody, request: Request, engine: Engine, who: Worker) -> Response:
    """Continues a prompt; ``output`` is the prompt with its continuation."""
    if body.steering_vector_id is None and body.steering_strength != 0:
        raise ValidationError(
            f"steering_strength is {body.steering_strength} and there is no steering_vector_id: give one, or leave "
            "the strength at 0."
        )
    settings = {"temperature": body.temperature, "min_p": body.min_p}
    sampling = Sampling(
        body.sampling_method,
        body.top_k,
        body.top_p,
        **{name: value for name, value in settings.items() if value is not None},
    )
    steering = await engine.steerings.by_vector(
        who.account_id, body.steering_vector_id, body.steering_strength
    )
    answers = [
        engine.scheduler.submit(
            TextRequest(
                await engine.encode(body.prompt),
                max_tokens=body.max_tokens,
                sampling=sampling,
                seed=body.seed,
                stops=_stops(body.stop),
                steering=steering + engine.steerings.corrections,
                owner=who.account_id,
                onlooker=engine.steerings.correcting.onlooker(),
            )
        )
    ]
    (result,) = await done_or_gone(request, results_of(answers))
    return JSONResponse({"output": await run_sync(engine.encoder.text, body.prompt) + result.text})


@router.post("/steering/generate")
async def generate_vectors(
    body: SteeringBody, request: Request, engine: Engine, who: Worker
) -> dict[str, str]:
    """Computes a steering vector from contrastive answers and keeps it for the account."""
    vector = await _computed(request, engine, who, _examples(engine, body), body.layer_idxs, body.method)
    return {
        "steering_vector_id": await run_sync(store_of(request).library.add_vector, who.account_id, vector)
    }


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
    examples = _examples(engine, body)
    given, owned = None, False
    if body.steering_vector_id is not None:
        owned = await run_sync(library.vector, who.account_id, body.steering_vector_id) is not None
        given = await engine.steerings.vector(who.account_id, body.steering_vector_id)
    behavior = None
    if len(body.prompts) >= LEAST_EXAMPLES:
        behavior = await _behavior(request, engine, who, body, examples, given)
    vector: SteeringVector | str
    if given is None:
        vector = await _computed(request, engine, who, examples, None, "caa")
    elif owned:
        vector = str(body.steering_vector_id)
    else:
        # One of the operator's: the account keeps a copy, which stays when the operator's goes.
        vector = given
    made = await run_sync(
        library.add_behavior, who.account_id, body.behavior_name, body.description, examples, vector, behavior
    )
    return shown(made)


@router.get("/steering/vectors")
async def kept_vectors(request: Request, who: Sender) -> list[dict[str, Any]]:
    """The account's steering vectors, oldest first."""
    return [shown(one) for one in await run_sync(store_of(request).library.vectors, who.account_id)]


@router.delete("/steering/vectors/{vector_id:path}", status_code=204, response_class=Response)
async def delete_vector(vector_id: str, request: Request, who: Sender) -> None:
    """Deletes a steering vector that no behavior uses."""
    await run_sync(store_of(request).library.delete_vector, who.account_id, vector_id)


@router.get("/behaviors")
async def behaviors(request: Request, who: Sender) -> list[dict[str, Any]]:
    """The account's behaviors, oldest first."""
    return [shown(one) for one in await run_sync(store_of(request).library.behaviors, who.account_id)]


@router.delete("/behaviors/{behavior_name:path}", status_code=204, response_class=Response)
async def delete_behavior(behavior_name: str, request: Request, who: Sender) -> None:
    """Deletes a behavior; its steering vector stays."""
    await run_sync(store_of(request).library.delete_behavior, who.account_id, behavior_name)


@router.post("/sae/generate")
async def sae_generate(body: SaeBody, request: Request, engine: Engine, who: Worker) -> JSONResponse:
    """Continues a prompt while behaviors are watched; ``text`` is the prompt with its continuation.

    Without ``behavior_names`` all that the account made for this model are watched; a request that names none has those
    corrected that the server corrects in every answer.
    """
    steerings, names = engine.steerings, body.behavior_names
    behaviors = await (
        steerings.watched.every(who.account_id)
        if names is None
        else steerings.watched.named(who.account_id, names)
    )
    forced = await steerings.watched.named(who.account_id, body.force_steering or ())
    edits = forced_edits(forced)
    if not names:
        known = {behavior.name for behavior in behaviors}
        behaviors += tuple(b for b in steerings.correcting.behaviors if b.name not in known)
        edits += steerings.corrections
    onlooker = Watching(behaviors, body.action).onlooker()
    asked = TextRequest(
        await engine.encode(body.prompt),
        max_tokens=body.max_new_tokens,
        sampling=Sampling(**body.sampling),
        seed=body.seed,
        stops=_stops(body.stop),
        steering=edits,
        owner=who.account_id,
        onlooker=onlooker,
    )
    (result,) = await done_or_gone(request, results_of([engine.scheduler.submit(asked)]))
    told: dict[str, Any] = {
        "text": await run_sync(engine.encoder.text, body.prompt) + result.text,
        "finish_reason": result.finish_reason,
        "detected": list(onlooker.detected) if onlooker is not None else [],
    }
    if body.return_trace:
        texts = [engine.token_texts[token][0] for token in result.tokens]
        told["trace"] = [asdict(token) for token in trace_of(result, texts, onlooker)]
    return JSONResponse(told)


@router.get("/graph", status_code=501)
async def graph(who: Sender) -> None:
    """The model's computation graph: not part of this version."""
    raise _absent("The model's graph")


@router.get("/paths", status_code=501)
async def paths(who: Sender) -> None:
    """The model's module paths: not part of this version."""
    raise _absent("The list of module paths")


@router.post("/attribution-patching/scores", status_code=501)
async def attribution_scores(body: ScoresBody, who: Sender) -> None:
    """Attribution patching: not part of this version."""
    raise _absent("Attribution patching")


@router.post("/raag/generate", status_code=501)
async def raag_generate(body: RaagBody, who: Sender) -> None:
    """Retrieval-augmented answers with attribution: not part of this version."""
    raise _absent("Retrieval-augmented answer generation")


async def _computed(
    request: Request,
    engine: ServingEngine,
    who: Principal,
    examples: Mapping[str, Sequence[Any]],
    layer_idxs: Sequence[int] | None,
    method: str,
) -> SteeringVector:
    """What ``steering.generate_vectors`` of a local client computes, for as long as the sender waits for it."""
    _check_count(len(layer_idxs or ()), engine.settings.max_example_layers, "layers")
    await engine.check_examples(
        examples["prompts"], [*examples["positive_answers"], *examples["negative_answers"]]
    )
    check_method(method)
    await run_sync(store_of(request).library.check_room, who.account_id)
    compute = vectors_by(method)

    def work(adapter: ModelAdapter) -> SteeringVector:
        return compute(adapter, *examples.values(), layer_idxs, tokenizer=engine.tokenizer)

    return await _done(request, engine, who, work)


async def _behavior(
    request: Request,
    engine: ServingEngine,
    who: Principal,
    body: BehaviorBody,
    examples: Mapping[str, Sequence[Any]],
    vector: SteeringVector | None,
) -> Behavior:
    """What ``sae.create_behavior`` of a local client makes."""
    await engine.check_examples(
        examples["prompts"], [*examples["positive_answers"], *examples["negative_answers"]]
    )
    await run_sync(store_of(request).library.check_room, who.account_id)
    source, sae = await engine.autoencoder() or (None, None)

    def work(adapter: ModelAdapter) -> Behavior:
        return create(
            adapter,
            body.behavior_name,
            *examples.values(),
            sae=sae,
            source=source,
            description=body.description,
            vector=vector,
            steering_vector_id=body.steering_vector_id,
            tokenizer=engine.tokenizer,
        )

    return await _done(request, engine, who, work)


async def _done(
    request: Request, engine: ServingEngine, who: Principal, work: Callable[[ModelAdapter], T]
) -> T:
    """What work on the model comes to, one piece of an account at a time, for as long as the sender waits for it."""
    with guards_of(request).one_at_a_time(who):
        return await done_or_gone(request, engine.scheduler.run(work))


def _check_count(n: int, most: int, what: str) -> None:
    if n > most:
        raise ValidationError(f"a vector of {n} {what} was asked for, and this server takes {most} at most.")


def _examples(engine: ServingEngine, body: SteeringBody | BehaviorBody) -> dict[str, Sequence[Any]]:
    _check_count(len(body.prompts), engine.settings.max_examples, "examples")
    return {
        "prompts": body.prompts,
        "positive_answers": body.positive_answers,
        "negative_answers": body.negative_answers,
    }


def _stops(stop: str | list[str] | None) -> tuple[str, ...]:
    stops = () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)
    if not all(stops):
        raise ValidationError(f"stop is a text or a list of texts, none of them empty; got {stop!r}.")
    return stops


def _absent(what: str, instead: str | None = None) -> APIError:
    return APIError(
        f"{what} is not part of this version of the server{f'; {instead}' if instead else ''}.", 501
    )
