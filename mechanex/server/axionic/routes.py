"""The Axionic API: generation, steering vectors and behaviors of accounts, under the paths of its HTTP contract."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from anyio.to_thread import run_sync
from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response

from ...engine.methods import check_method, vectors_by
from ...engine.raag.answer import answer_questions, check_questions
from ...engine.raag.documents import as_documents
from ...engine.sampling import Sampling
from ...errors import APIError, ValidationError
from ..accounts.auth import Principal
from ..accounts.store import store_of
from ..http.disconnect import done_or_gone
from ..model.engine import Engine, ServingEngine
from ..model.requests import TextRequest, results_of
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
    from ...engine.vectors import SteeringVector

__all__ = ["axionic_router"]

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
    """Keeps a behavior: a name for a vector, which is computed from the examples where no id of one is given."""
    library = store_of(request).library
    if body.behavior_name in engine.steerings.own_behaviors:
        raise ValidationError(
            f"the behavior {body.behavior_name!r} is the server's own, and every client may use it: choose another "
            "name."
        )
    await run_sync(library.check_name, who.account_id, body.behavior_name)
    examples = _examples(engine, body)
    vector: SteeringVector | str
    if body.steering_vector_id is None:
        vector = await _computed(request, engine, who, examples, None, "caa")
    elif await run_sync(library.vector, who.account_id, body.steering_vector_id) is not None:
        vector = body.steering_vector_id
    else:
        # One of the operator's: the account keeps a copy, which stays when the operator's goes.
        vector = await engine.steerings.vector(who.account_id, body.steering_vector_id)
    made = await run_sync(
        library.add_behavior, who.account_id, body.behavior_name, body.description, examples, vector
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


@router.post("/sae/generate", status_code=501)
async def sae_generate(body: SaeBody, who: Sender) -> None:
    """Generation under the watch of a sparse autoencoder: not part of this version."""
    raise _absent("Generation with a sparse autoencoder", "POST /generate steers with a behavior's vector")


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


@router.post("/raag/generate")
async def raag_generate(body: RaagBody, request: Request, engine: Engine, who: Worker) -> dict[str, Any]:
    """Answers questions from documents, and says which chunks each token of an answer rests on."""
    docs, index = body.docs, body.pinecone_index_name
    _check_count(len(body.qa_entries), engine.settings.max_examples, "questions")
    questions = check_questions(body.qa_entries)
    for text in [text for entry in questions for text in entry if text is not None]:
        engine.encoder.check_size(text)
    if docs is not None:
        _check_count(len(docs), engine.settings.max_examples, "documents")
        as_documents(docs)

    def work(adapter: ModelAdapter) -> dict[str, Any]:
        return answer_questions(adapter, engine.tokenizer, body.qa_entries, docs, index)

    with guards_of(request).one_at_a_time(who):
        return await done_or_gone(request, engine.scheduler.run(work))


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

    with guards_of(request).one_at_a_time(who):
        return await done_or_gone(request, engine.scheduler.run(work))


def _check_count(n: int, most: int, what: str) -> None:
    if n > most:
        raise ValidationError(f"{n} {what} were given, and this server takes {most} at most.")


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
