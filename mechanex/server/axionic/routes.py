"""The Axionic API: generation, steering vectors and behaviors of accounts, under the paths of its HTTP contract."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from ...engine.sampling import Sampling
from ...errors import ValidationError
from ..accounts.store import store_of
from ..http.disconnect import done_or_gone
from ..http.routes import Route
from ..library.threads import run_sync
from ..library.watched import Watching
from ..model.engine import Engine
from ..model.requests import TextRequest, results_of
from ..model.rules import held_to
from . import accounts, attribution, behaviors, raag
from .accounts import shown
from .bodies import GenerateBody, Output, Reason, SteeringBody
from .guards import Sender, Worker
from .work import computed, examples_of, stops_of

__all__ = ["axionic_router"]

router = APIRouter(tags=["axionic"], route_class=Route)


def axionic_router() -> APIRouter:
    """Every call of the HTTP contract of the Axionic API; see ``docs/serving.md``."""
    statuses = (400, 401, 403, 404, 413, 429, 500, 503, 504, 507)
    whole = APIRouter(
        responses={status: {"model": Reason, "description": "An error."} for status in statuses}
    )
    whole.include_router(accounts.router)
    whole.include_router(router)
    whole.include_router(behaviors.router)
    whole.include_router(attribution.router)
    whole.include_router(raag.router)
    return whole


@router.get("/models")
async def models(engine: Engine, who: Sender) -> dict[str, Any]:
    """The models that the server runs: one."""
    return {"models": [{"name": engine.model_name}]}


@router.post("/generate", responses={200: {"model": Output}})
async def generate(body: GenerateBody, request: Request, engine: Engine, who: Worker) -> Response:
    """Continues a prompt; ``output`` is the prompt with its continuation."""
    if body.steering_vector_id is None and body.steering_strength:
        raise ValidationError(
            f"steering_strength is {body.steering_strength} and there is no steering_vector_id: give one, or leave "
            "the strength at 0."
        )
    settings = {"temperature": body.temperature, "min_p": body.min_p, "typical_p": body.typical_p}
    sampling = Sampling(
        body.sampling_method,
        body.top_k,
        body.top_p,
        **{name: value for name, value in settings.items() if value is not None},
    )
    steering = await engine.steerings.by_vector(
        who.account_id,
        body.steering_vector_id,
        1.0 if body.steering_strength is None else body.steering_strength,
    )
    asked = TextRequest(
        await engine.encode(body.prompt),
        max_tokens=body.max_tokens,
        sampling=sampling,
        seed=body.seed,
        stops=stops_of(body.stop),
        steering=steering + engine.steerings.corrections,
        owner=who.account_id,
        onlooker=Watching(floor=engine.steerings.floor).onlooker(),
    )
    generation = engine.scheduler.submit(await held_to(engine, body, asked))
    (result,) = await done_or_gone(request, results_of([generation]))
    text = await engine.text(body.prompt) + result.text
    return JSONResponse({"output": text, "finish_reason": result.finish_reason})


@router.post("/steering/generate")
async def generate_vectors(
    body: SteeringBody, request: Request, engine: Engine, who: Worker
) -> dict[str, str]:
    """Computes a steering vector from contrastive answers and keeps it for the account."""
    examples = await examples_of(engine, body)
    vector = await computed(request, engine, who, examples, body.layer_idxs, body.method)
    return {
        "steering_vector_id": await run_sync(store_of(request).library.add_vector, who.account_id, vector)
    }


@router.get("/steering/vectors")
async def kept_vectors(request: Request, who: Sender) -> list[dict[str, Any]]:
    """The account's steering vectors, oldest first."""
    return [shown(one) for one in await run_sync(store_of(request).library.vectors, who.account_id)]


@router.delete("/steering/vectors/{vector_id:path}", status_code=204, response_class=Response)
async def delete_vector(vector_id: str, request: Request, who: Sender) -> None:
    """Deletes a steering vector that no behavior uses."""
    await run_sync(store_of(request).library.delete_vector, who.account_id, vector_id)
