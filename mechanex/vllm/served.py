"""What a server on vLLM steers by and has watched: what clients registered, and what its operator keeps."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from pydantic import ValidationError as InvalidBody

from ..engine.intervention import Edit
from ..engine.sae.behavior import Behavior
from ..engine.sae.store import BehaviorStore
from ..engine.vector_store import VectorStore
from ..errors import NotFoundError, ValidationError
from ..server.http.body import Body
from ..server.library.folder import SharedVectors
from ..server.library.watched import WatchedBehaviors
from ..server.openai.bodies import GenerationBody, SteeringFields
from .asked import Carried
from .engine_behaviors import EngineBehaviors
from .engine_vectors import EngineVectors, SteerBy
from .llm import vectors_of

__all__ = [
    "BEHAVIORS_VARIABLE",
    "FIELDS",
    "VECTORS_VARIABLE",
    "AskedSteering",
    "ServedSteering",
    "VectorBody",
    "invalid",
    "refused",
]

VECTORS_VARIABLE = "MECHANEX_VLLM_VECTORS"
"""The environment variable that names a folder of vector files for every client."""

BEHAVIORS_VARIABLE = "MECHANEX_VLLM_BEHAVIORS"
"""The environment variable that names files of behaviors for every client, with ``os.pathsep`` between them."""

FIELDS = (*SteeringFields.model_fields, "behavior_scores")
"""The fields of bodies that are this server's."""


class VectorBody(Body):
    """POST /v1/steering/vectors."""

    id: str | None = Field(default=None, min_length=1, max_length=256)
    layers: dict[str, list[float]] = Field(min_length=1, max_length=1024)
    edit: Literal["add", "ablate", "clamp"] = "add"
    value: float = Field(
        default=0.0, description="What a clamp sets the projection to, in lengths of the vector."
    )


@dataclass(frozen=True)
class AskedSteering:
    """What a request asks for.

    Args:
        carried: what becomes of it.
        watch: the name by which its scores are asked for; None where nothing is watched.
        scores: whether its answer has the scores.
    """

    carried: Carried
    watch: str | None = None
    scores: bool = False


class ServedSteering:
    """Vectors and behaviors of one server; for its event loop's thread.

    Args:
        state: the state of vLLM's application.

    Raises:
        MechanexError: a behavior's file that isn't there, is none, or is another model's.
    """

    def __init__(self, state: Any) -> None:
        self._engine = state.engine_client
        self._several = (getattr(state.args, "api_server_count", None) or 1) > 1
        folder = os.environ.get(VECTORS_VARIABLE)
        files = [Path(one) for one in os.environ.get(BEHAVIORS_VARIABLE, "").split(os.pathsep) if one]
        self._shared = SharedVectors(Path(folder) if folder else None)
        self._stored = VectorStore()
        self.vectors: EngineVectors = vectors_of(state.vllm_config)
        self._watcher = EngineBehaviors(state.vllm_config, self.vectors.held)
        self._behaviors = WatchedBehaviors(
            state.vllm_config.model_config.model, self._watcher.check, files, None, BehaviorStore()
        )
        self._sending = asyncio.Lock()

    def register(self, body: VectorBody) -> str:
        """Takes a client's vector in, and gives its id.

        Raises:
            ValidationError: it doesn't fit, its id is the server's own, or there are several API servers.
        """
        if self._several:
            raise ValidationError(
                "vectors are registered with one API server (--api-server-count 1), and this has several: put them "
                "into the folder of --vectors."
            )
        if body.id is not None and (self._shared.loaded(body.id) or body.id in self._stored):
            raise ValidationError(f"{body.id!r} is a vector of the server's own: choose another id.")
        edits = {_layer(layer): _edit(body, numbers) for layer, numbers in body.layers.items()}
        return self.vectors.add(edits, body.id)

    async def asked(self, ours: Mapping[str, Any]) -> AskedSteering:
        """What a request with these fields asks for.

        Raises:
            ValidationError: fields that don't agree, or name what there isn't.
        """
        try:
            body = GenerationBody.model_validate(ours)
        except InvalidBody as error:
            raise invalid(error) from error
        wanted = _wanted(body)
        for param, by in wanted:
            with _naming(param):
                await self._find(by.vector)
        behaviors = await self._watched_by(body)
        # From here to the lease of what it needs nothing is awaited, or what is held now could be forgotten meanwhile.
        with _naming(wanted[0][0] if wanted else "steering"):
            steered = self.vectors.asked([by for _, by in wanted])
        if not behaviors:
            return AskedSteering(steered)
        action, scores = body.behavior_action, bool(body.behavior_scores)
        done = "correct" if action is None or action == "steer" else action
        with _naming("behavior_names" if body.behavior_names else "corrected_behaviors"):
            watched, watch = self._watcher.asked(behaviors, done, told=scores)
        return AskedSteering(steered + watched, watch, scores)

    async def hold(self, carried: Carried) -> None:
        """Has the workers hold what a request needs; it is leased already."""
        held = self.vectors.held
        async with self._sending:  # what is forgotten and sent again must arrive in this order
            for key, data in carried.missing.items():
                if key not in held:
                    await self._engine.collective_rpc("steering_register", args=(key, data, held.owner))
                    held.sent(key, len(data))
            if surplus := held.surplus():
                await self._engine.collective_rpc("steering_forget", args=(surplus, held.owner))

    async def seen(self, watch: str) -> list[Any]:
        """What was seen in the answers of a request, once."""
        found: list[Any] = (await self._engine.collective_rpc("steering_seen", args=(watch,)))[0]
        return found

    async def _find(self, vector_id: str) -> None:
        """Takes in a vector of the server's own when it is first asked for."""
        if vector_id in self.vectors:
            return
        found = await asyncio.to_thread(self._shared.get, vector_id)
        if found is None and vector_id in self._stored:
            found = await asyncio.to_thread(self._stored.get, vector_id)
        if found is not None:
            self.vectors.add(found, vector_id)

    async def _watched_by(self, body: GenerationBody) -> list[Behavior]:
        """The behaviors that a body has watched."""
        named, corrected = body.behavior_names or (), body.corrected_behaviors or ()
        if not (named or corrected):
            if body.behavior_scores:
                raise refused("behavior_scores are of behavior_names: name some.", "behavior_scores")
            return []
        # As by our own server: an action has behaviors watched, and without one a strength is that of their vectors.
        at_strength = body.steering_strength is not None and body.behavior_action is None
        if body.behavior_action == "steer" or (at_strength and not {*named} <= {*corrected}):
            raise refused(
                "in vLLM behaviors are watched and not steered by: name their vectors in steering, and say by "
                "behavior_action what is done where they show.",
                "behavior_action" if body.behavior_action else "steering_strength",
            )
        with _naming("behavior_names" if named else "corrected_behaviors"):
            return [await self._behavior(name) for name in dict.fromkeys([*named, *corrected])]

    async def _behavior(self, name: str) -> Behavior:
        found: Behavior | None = await self._behaviors.find(None, name)
        if found is None:
            raise NotFoundError(
                f"no behavior that can be watched is called {name!r} here: name a file of --behaviors, or one "
                "that create_behavior has kept on the server's machine."
            )
        return found


def _wanted(body: GenerationBody) -> list[tuple[str, SteerBy]]:
    """What a body steers by, each with the field that says so."""
    wanted: list[tuple[str, SteerBy]] = []
    one = body.steering_vector or body.steering_vector_id
    if one is not None:
        strength = 1.0 if body.steering_strength is None else body.steering_strength
        wanted.append(("steering_vector", SteerBy(one, strength)))
    elif body.steering_strength and not body.steering and not body.behavior_names:
        raise refused(
            f"steering_strength is {body.steering_strength} and there is nothing to steer with: give a "
            "steering_vector.",
            "steering_strength",
        )
    if body.steering_condition is not None or any(item.condition for item in body.steering or ()):
        raise refused("in vLLM nothing is steered on a condition: leave it out.", "steering_condition")
    for item in body.steering or ():
        wanted.append(("steering", SteerBy(item.vector, item.strength, item.layers, item.selector)))
    return wanted


@contextmanager
def _naming(param: str) -> Iterator[None]:
    """Has refusals in its block name a field."""
    try:
        yield
    except (NotFoundError, ValidationError) as error:
        raise refused(error.message, param) from error


def refused(message: str, param: str) -> ValidationError:
    """An error that names the field at fault."""
    return ValidationError(message, details={"param": param})


def invalid(error: InvalidBody) -> ValidationError:
    """What a body's check says first."""
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"]) or "the body"
    said = str(first["msg"]).removeprefix("Value error, ")[:500]
    return refused(f"Invalid value for {where[:100]!r}: {said}", str(first["loc"][:1] or where))


def _edit(body: VectorBody, numbers: Sequence[float]) -> Edit:
    vector = torch.tensor(numbers, dtype=torch.float32)
    if vector.numel() == 0:
        raise ValidationError("a layer has no numbers.")
    if body.edit == "ablate":
        return Edit.ablate(vector)
    return Edit.clamp(vector, body.value) if body.edit == "clamp" else Edit.add(vector)


def _layer(name: str) -> int:
    try:
        return int(name)
    except ValueError:
        raise ValidationError(f"layers are named by their numbers; got {name[:40]!r}.") from None
