"""The model's structure, and attribution patching."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from ...engine.attribution.edge_scores import scores_answer
from ...engine.structure.graph import model_graph, model_paths
from ..http.answers import json_answer
from ..http.disconnect import done_or_gone
from ..http.routes import Route
from ..model.engine import Engine
from .bodies import ScoresBody
from .guards import Worker
from .work import done

if TYPE_CHECKING:
    from ...engine.models.adapter import ModelAdapter

__all__ = ["router"]

router = APIRouter(tags=["axionic"], route_class=Route)


@router.get("/graph")
async def graph(request: Request, engine: Engine, who: Worker) -> JSONResponse:
    """The model's modules, and the way of its residual stream among them."""
    return JSONResponse({"graph": await done_or_gone(request, engine.scheduler.run(model_graph))})


@router.get("/paths")
async def paths(request: Request, engine: Engine, who: Worker) -> JSONResponse:
    """The modules that ``/attribution-patching/scores`` takes."""
    return JSONResponse({"paths": await done_or_gone(request, engine.scheduler.run(model_paths))})


@router.post("/attribution-patching/scores")
async def scores(body: ScoresBody, request: Request, engine: Engine, who: Worker) -> Response:
    """What modules, heads, positions and edges are worth to the difference between two prompts' answers."""
    clean = len(await engine.encode(body.clean_prompt))
    corrupted = len(await engine.encode(body.corrupted_prompt))
    n_tokens = clean + corrupted * (1 + _n_runs(engine.adapter, body, corrupted))

    work = partial(
        scores_answer,
        clean_prompt=body.clean_prompt,
        corrupted_prompt=body.corrupted_prompt,
        target_module_paths=body.target_module_paths,
        tokenizer=engine.tokenizer,
        method=body.method,
        steps=body.steps,
        metric=body.metric,
        align=body.align,
        positions=body.positions,
        edges=body.edges,
        recompute_attention=body.recompute_attention,
        drop_layers=body.drop_layers,
    )
    found = await done(request, engine, who, work, n_tokens)
    return await json_answer(lambda: found)


def _n_runs(adapter: ModelAdapter, body: ScoresBody, n_positions: int) -> int:
    """About how many times the corrupted prompt is run for its scores: once for each gradient or each exact score."""
    usual = 2 * adapter.n_layers + 1  # the embedding, and what attends and what doesn't in each layer
    paths = usual if body.target_module_paths is None else len(body.target_module_paths)
    if body.method == "exact":
        return paths * (1 + n_positions * body.positions) + body.edges * usual * (usual + 1) // 2
    return body.steps * ((adapter.n_layers if body.drop_layers else 1) + body.edges)
