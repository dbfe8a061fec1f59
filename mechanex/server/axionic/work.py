"""What calls of the Axionic API have in common: examples, and work on the model for as long as the sender waits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import Request

from ...engine.few_shot import passes_over
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

__all__ = ["ReadableExamples", "check_count", "computed", "done", "examples_of", "stops_of"]

T = TypeVar("T")


@dataclass(frozen=True)
class ReadableExamples:
    """Contrastive examples that the model can read.

    Args:
        lists: prompts, positive and negative answers by the body's names of them, in this order.
        n_tokens: how many tokens they have.
    """

    lists: Mapping[str, Sequence[Any]]
    n_tokens: int


async def computed(
    request: Request,
    engine: ServingEngine,
    who: Principal,
    examples: ReadableExamples,
    layer_idxs: Sequence[int] | None,
    method: str,
) -> SteeringVector:
    """What ``steering.generate_vectors`` of a local client computes, for as long as the sender waits for it."""
    check_count(len(layer_idxs or ()), engine.settings.max_example_layers, "layers")
    check_method(method)
    await run_sync(store_of(request).library.check_room, who.account_id)
    prompts, positive, negative = examples.lists.values()

    work = partial(
        recorded_vectors,
        lists=(prompts, positive, negative),
        layers=layer_idxs,
        method=method,
        tokenizer=engine.tokenizer,
    )
    n_tokens = examples.n_tokens
    if method == "few-shot":
        n_tokens *= passes_over(len(prompts), len(layer_idxs or (0,)))
    return await done(request, engine, who, work, n_tokens)


async def done(
    request: Request, engine: ServingEngine, who: Principal, work: Callable[[ModelAdapter], T], n_tokens: int
) -> T:
    """What work on the model comes to, one piece of an account at a time, for as long as the sender waits for it.

    Args:
        request: whose client may leave.
        engine: whose model.
        who: the sender.
        work: is called with the adapter.
        n_tokens: that it reads, as far as that is known before; they count among the sender's of this minute.

    Raises:
        RateLimitError: the sender's work is being done already, or its tokens of this minute are used up.
    """
    with guards_of(request).one_at_a_time(who):
        engine.scheduler.take_tokens(n_tokens)
        return await done_or_gone(request, engine.scheduler.run(work))


def check_count(n: int, most: int, what: str) -> None:
    """Refuses more layers, examples, questions or documents than the server takes."""
    if n > most:
        raise ValidationError(f"the request has {n} {what}, and this server takes {most} at most.")


async def examples_of(engine: ServingEngine, body: SteeringBody | BehaviorBody) -> ReadableExamples:
    """The examples of a body, as many as the server takes at most, each of which the model can read."""
    check_count(len(body.prompts), engine.settings.max_examples, "examples")
    n_tokens = await engine.check_examples(body.prompts, [*body.positive_answers, *body.negative_answers])
    lists: dict[str, Sequence[Any]] = {
        "prompts": body.prompts,
        "positive_answers": body.positive_answers,
        "negative_answers": body.negative_answers,
    }
    return ReadableExamples(lists, n_tokens)


def stops_of(stop: str | list[str] | None) -> tuple[str, ...]:
    """The stop texts of a body."""
    stops = () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)
    if not all(stops):
        raise ValidationError(f"stop is a text or a list of texts, none of them empty; got {stop!r}.")
    return stops
