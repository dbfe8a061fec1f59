"""What a body asks for in the engine's terms: sampling, edits, and what is watched; yet without a prompt."""

from __future__ import annotations

from ...engine.prompt_conditions import PromptCondition
from ...engine.sae.behavior import Behavior
from ...engine.sae.watching import forced_edits
from ...errors import NotFoundError, ValidationError
from ..accounts.auth import Principal
from ..http.errors import invalid
from ..library.watched import Watching
from ..model.engine import ServingEngine
from ..model.requests import Steer, TextRequest
from ..model.rules import held_to
from .bodies import ConditionItem, GenerationBody, SteeringFields

__all__ = ["common_of", "steering_of"]


async def common_of(
    engine: ServingEngine, body: GenerationBody, who: Principal
) -> tuple[TextRequest, Watching]:
    """What both kinds of request say of their answers, yet without a prompt, and what they have watched in them."""
    steering, watching = await steering_of(engine, body, who)
    common = TextRequest(
        (),
        sampling=body.sampling,
        stops=body.stops,
        steering=steering,
        owner=who.account_id,
        stream=bool(body.stream),
    )
    return await held_to(engine, body, common), watching


async def steering_of(
    engine: ServingEngine, body: SteeringFields, who: Principal
) -> tuple[tuple[Steer, ...], Watching]:
    """The request's edits, in the order: the one vector, the list, the behaviors; and what it has watched."""
    vector = body.steering_vector or body.steering_vector_id
    named, forced = body.behavior_names or (), body.force_steering or ()
    corrected = body.corrected_behaviors or ()
    names = list(dict.fromkeys([*named, *forced]))
    given = body.steering_strength
    if given and vector is None and not names:
        raise invalid(
            f"steering_strength is {given} and there is nothing to steer with: give a steering_vector.",
            "steering_strength",
        )
    strength = 1.0 if given is None else given
    found: list[Steer] = []
    steerings = engine.steerings
    param = "steering_vector"
    try:
        param = "steering_condition"
        condition = await _condition(engine, who, body.steering_condition)
        param = "steering_vector"
        found += await steerings.by_vector(who.account_id, vector, strength, condition=condition)
        param = "steering"
        for item in body.steering or ():
            found += await steerings.by_vector(
                who.account_id,
                item.vector,
                item.strength,
                layers=item.layers,
                tokens=item.selector,
                condition=await _condition(engine, who, item.condition),
            )
        watched: dict[str, Behavior] = {}
        for name in names:
            param = "behavior_names" if name in named else "force_steering"
            behavior = await _watched(engine, body, who, name)
            if behavior is None:
                beyond = steerings.beyond_corrections(name, strength)
                found += await steerings.by_behavior(who.account_id, name, beyond)
                continue
            if name in forced:
                found += forced_edits([behavior])
            if name in named:
                watched[name] = behavior
        param = "corrected_behaviors"
        more = [name for name in dict.fromkeys(corrected) if name not in watched]
        watched.update(zip(more, await steerings.watched.named(who.account_id, more), strict=True))
    except (NotFoundError, ValidationError) as error:
        raise invalid(error.message, param) from error
    action = body.behavior_action
    found += steerings.corrections
    done = action if action is not None and action != "steer" else "correct"
    return tuple(found), Watching(tuple(watched.values()), done, steerings.floor)


async def _condition(
    engine: ServingEngine, who: Principal, item: ConditionItem | None
) -> PromptCondition | None:
    if item is None:
        return None
    return await engine.steerings.condition(who.account_id, item.vector, item.threshold, item.layer)


async def _watched(engine: ServingEngine, body: SteeringFields, who: Principal, name: str) -> Behavior | None:
    """The behavior of this name where it is to be watched; None where its vector is to be added."""
    watched = engine.steerings.watched
    action = body.behavior_action if name in (body.behavior_names or ()) else None
    if action == "steer":
        return None
    if action is not None or name in (body.corrected_behaviors or ()):
        return (await watched.named(who.account_id, [name]))[0]
    return await watched.find(who.account_id, name) if body.steering_strength is None else None
