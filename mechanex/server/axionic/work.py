"""What calls of the Axionic API have in common: examples, and work on the model for as long as the sender waits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import Request

from ...engine.methods import check_method, recorded_vectors
from ...errors import ValidationError
from ..accounts.auth import Principal
from ..accounts.store import store_of
from ..http.disconnect import done_or_gone
from ..library.threads import run_sync
from ..model.engine import ServingEngine
from .bodies import BehaviorBody, SteeringBody
from .guards import guards_of

if TYPE_CHECKING:
    from ...engine.models.adapter import ModelAdapter
    from ...engine.vectors import SteeringVector

__all__ = ["check_count", "computed", "done", "examples_of", "stops_of"]

T = TypeVar("T")


async def computed(
    request: Request,
    engine: ServingEngine,
    who: Principal,
    examples: Mapping[str, Sequence[Any]],
    layer_idxs: Sequence[int] | None,
    method: str,
) -> SteeringVector:
    """What ``steering.generate_vectors`` of a local client computes, for as long as the sender waits for it."""
    check_count(len(layer_idxs or ()), engine.settings.max_example_layers, "layers")
    check_method(method)
    await run_sync(store_of(request).library.check_room, who.account_id)
    prompts, positive, negative = examples.values()

    def work(adapter: ModelAdapter) -> SteeringVector:
        return recorded_vectors(adapter, (prompts, positive, negative), layer_idxs, method, engine.tokenizer)

    return await done(request, engine, who, work)


async def done(
    request: Request, engine: ServingEngine, who: Principal, work: Callable[[ModelAdapter], T]
) -> T:
    """What work on the model comes to, one piece of an account at a time, for as long as the sender waits for it."""
    with guards_of(request).one_at_a_time(who):
        return await done_or_gone(request, engine.scheduler.run(work))


def check_count(n: int, most: int, what: str) -> None:
    """Refuses more layers, examples, questions or documents than the server takes."""
    if n > most:
        raise ValidationError(f"the request has {n} {what}, and this server takes {most} at most.")


async def examples_of(engine: ServingEngine, body: SteeringBody | BehaviorBody) -> dict[str, Sequence[Any]]:
    """The examples of a body, as many as the server takes at most, each of which the model can read."""
    check_count(len(body.prompts), engine.settings.max_examples, "examples")
    await engine.check_examples(body.prompts, [*body.positive_answers, *body.negative_answers])
    return {
        "prompts": body.prompts,
        "positive_answers": body.positive_answers,
        "negative_answers": body.negative_answers,
    }


def stops_of(stop: str | list[str] | None) -> tuple[str, ...]:
    """The stop texts of a body."""
    stops = () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)
    if not all(stops):
        raise ValidationError(f"stop is a text or a list of texts, none of them empty; got {stop!r}.")
    return stops
