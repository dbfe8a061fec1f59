"""From what a request names to the edits of its answer: whose vector an id is, and what a behavior steers by."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ...engine.decode.request import Steer
from ...engine.memory import tensor_bytes
from ...engine.models.adapter import ModelAdapter
from ...engine.positions import TokenSelector
from ...engine.prompt_conditions import PromptCondition
from ...engine.sae.behavior import Behavior
from ...engine.sae.store import BehaviorStore
from ...engine.sae.watching import check_fits
from ...engine.vector_store import VectorStore
from ...engine.vectors import SteeringVector
from ...errors import APIError, NotFoundError, ValidationError
from ..settings import ServerSettings
from .folder import SharedVectors
from .listing import ListedVector, listed_vectors, server_vectors
from .records import Library
from .threads import look_up
from .watched import WatchedBehaviors

__all__ = ["Steerings"]

_logger = logging.getLogger(__name__)
_MOST_KEPT = 1024
# A vector of every layer of a large model has megabytes; one that clamps has them at every strength again.
_MOST_EDIT_BYTES = 2**28

_Layers = tuple[int, ...] | None
"""Those that a request takes of a vector; None for all."""


class Steerings:
    """The vectors and behaviors that senders may use; for the event loop's thread.

    Args:
        adapter: the model.
        settings: the folder of vectors, the behaviors, the corrected ones.
        library: accounts' vectors and behaviors, or None.
        vectors: the operator's vectors.
        make_behaviors: makes the vectors of the server's own behaviors, by name (:func:`.shared.make_behaviors`).

    Attributes:
        watched: the behaviors with detectors.

    Raises:
        ValidationError: a vector of another model, or a corrected behavior that nobody made.
        NotFoundError: a folder or file that isn't there.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        settings: ServerSettings,
        library: Library | None,
        vectors: VectorStore,
        make_behaviors: Callable[[], Mapping[str, SteeringVector]] = dict,
    ) -> None:
        self._adapter, self._library, self._vectors = adapter, library, vectors
        self._shared = SharedVectors(settings.vectors)
        for name, vector in self._shared:
            self._check_fits(name, vector)
        self._behaviors = make_behaviors()
        self.watched = WatchedBehaviors(
            adapter.model_id,
            lambda behavior: check_fits(adapter, behavior),
            settings.behaviors,
            library,
            BehaviorStore(),
        )
        self._checked: OrderedDict[tuple[bytes, _Layers, float], None] = OrderedDict()
        self._edits: OrderedDict[tuple[bytes, _Layers, float | None], tuple[Steer, ...]] = OrderedDict()
        self._edit_bytes = 0
        self._conditions: OrderedDict[tuple[bytes, int, float], PromptCondition] = OrderedDict()
        corrected = {name: self._to_correct(name) for name in settings.corrected_behaviors}
        self._corrected = {name: one for name, one in corrected.items() if isinstance(one, SteeringVector)}
        self._names = frozenset({*self._behaviors, *self.watched.own, *corrected})
        self.floor = tuple(one for one in corrected.values() if isinstance(one, Behavior))
        """The behaviors that are watched and corrected in every answer."""

    @property
    def own_behaviors(self) -> frozenset[str]:
        """Names of the behaviors that the server was started with, which no client may take."""
        return self._names

    @property
    def corrections(self) -> tuple[Steer, ...]:
        """The edits of the behaviors that every answer is steered by, at strength 1."""
        return tuple(steer for vector in self._corrected.values() for steer in self.edits(vector, 1.0))

    def beyond_corrections(self, name: str, strength: float) -> float:
        """What is left of a behavior's strength where every answer is steered by it: a request may ask for more."""
        return max(0.0, strength - 1.0) if name in self._corrected else strength

    async def by_vector(
        self,
        account_id: str | None,
        vector_id: str | None,
        strength: float = 1.0,
        *,
        layers: Sequence[int] | None = None,
        tokens: TokenSelector = None,
        condition: PromptCondition | None = None,
    ) -> tuple[Steer, ...]:
        """The edits of a stored vector that this sender may use; () for None.

        Looks among the server's own (``--vectors``), then the account's, then, for the operator, the stored ones, then
        among the vectors of the server's own behaviors, by their names.

        Args:
            account_id: the sender's account, or None for the operator.
            vector_id: the vector's id.
            strength: multiplies it; 0 steers nothing.
            layers: only these of its layers.
            tokens: absolute positions to steer; None for all.
            condition: has to be met by the prompt; None for the vector's own, if it has one.

        Raises:
            NotFoundError: there is none for this sender.
            ValidationError: a strength that isn't finite, a layer that the vector hasn't, or another model's vector.
        """
        if vector_id is None:
            return ()
        vector = await self.vector(account_id, vector_id)
        found = self.edits(vector, strength, tokens, layers)
        return found if condition is None else tuple(replace(steer, condition=condition) for steer in found)

    async def condition(
        self, account_id: str | None, vector_id: str, threshold: float, layer: int | None = None
    ) -> PromptCondition:
        """The condition whose direction is a stored vector's. The same one is the same object, so that rows share it.

        Args:
            account_id: the sender's account, or None for the operator.
            vector_id: the vector's id.
            threshold: of the prompts' mean cosine with it.
            layer: of a vector that has several.

        Raises:
            NotFoundError: there is no such vector for this sender.
            ValidationError: a vector of several layers and none named, or of another model.
        """
        vector = await self.vector(account_id, vector_id)
        if layer is None and len(vector) > 1:
            raise ValidationError(
                f"a condition is decided at one layer, and {vector_id!r} has layers {list(vector.layers)}: name one."
            )
        at = vector.layers[0] if layer is None else self._adapter.layer_index(layer)
        key = (vector.digest(), at, float(threshold))
        found = self._conditions.get(key)
        if found is None:
            vector.plan(self._adapter)
            ((_, direction),) = vector.restricted([at]).items()
            found = self._conditions[key] = PromptCondition(at, direction, threshold)
            if len(self._conditions) > _MOST_KEPT:
                self._conditions.popitem(last=False)
        self._conditions.move_to_end(key)
        return found

    async def by_behavior(
        self, account_id: str | None, name: str, strength: float = 1.0
    ) -> tuple[Steer, ...]:
        """The edits of a behavior's vector; as ``by_vector``.

        Raises:
            NotFoundError: this sender has no such behavior, and the server neither.
            ValidationError: one that has no vector.
        """
        vector = await look_up(self._behavior_vector, account_id, name)
        if vector is None:
            if await self.watched.find(account_id, name) is not None:
                raise ValidationError(
                    f"the behavior {name!r} is kept without a vector to steer by: leave steering_strength and "
                    "behavior_action 'steer' out, and it is corrected where it shows."
                )
            raise NotFoundError(
                f"no behavior is called {name!r} here: make one with POST /behaviors/create, or use one that the "
                "server was started with."
            )
        return self.edits(vector, strength)

    async def vector(self, account_id: str | None, vector_id: str) -> SteeringVector:
        """The stored vector that ``by_vector`` would use; errors as there."""
        found = self._shared.loaded(vector_id)
        if found is None:
            found = await look_up(self._find, account_id, vector_id)
        if found is None:
            raise NotFoundError(f"no steering vector has the id {vector_id!r} here.")
        return found

    async def listed(self, account_id: str | None) -> list[ListedVector]:
        """The vectors that ``vector`` finds for this sender, of many of one kind the latest."""
        return await look_up(
            lambda: listed_vectors(
                self._adapter,
                account_id,
                shared=self._shared,
                behaviors=self._behaviors,
                library=self._library,
                kept=self._vectors,
            )
        )

    def own_vectors(self) -> list[ListedVector]:
        """The vectors of ``listed`` that the server has for every sender."""
        return server_vectors(self._adapter, self._shared, self._behaviors)

    def edits(
        self,
        vector: SteeringVector,
        strength: float,
        tokens: TokenSelector = None,
        layers: Sequence[int] | None = None,
    ) -> tuple[Steer, ...]:
        """A vector's edits, of some of its layers or all. Rows share those of one vector and layers; at other strengths
        only where strength multiplies them.

        Raises:
            ValidationError: a strength that isn't finite, a layer that the vector hasn't, or another model's vector.
        """
        only = None if layers is None else tuple(self._adapter.layer_index(layer) for layer in layers)
        digest, number = vector.digest(), float(strength)
        if (digest, only, number) not in self._checked:
            _part(vector, only).check(self._adapter, number)
            self._checked[digest, only, number] = None
            if len(self._checked) > _MOST_KEPT:
                self._checked.popitem(last=False)
        if number == 0:
            return ()
        alone = vector.terms.multiply
        key = (digest, only, None if alone else number)
        known = self._edits.get(key)
        if known is None:
            made = _part(vector, only).interventions(self._adapter, 1.0 if alone else number)
            known = tuple(Steer(i.layer, i.edit, i.tokens, i.varying, i.condition) for i in made)
            self._edits[key] = known
            self._edit_bytes += _bytes_of(known)
            while len(self._edits) > 1 and (
                self._edit_bytes > _MOST_EDIT_BYTES or len(self._edits) > _MOST_KEPT
            ):
                self._edit_bytes -= _bytes_of(self._edits.popitem(last=False)[1])
        self._edits.move_to_end(key)
        said: dict[str, Any] = {} if tokens is None else {"tokens": tokens}
        if alone:
            said["strength"] = number
        return tuple(replace(steer, **said) for steer in known)

    def _find(self, account_id: str | None, vector_id: str) -> SteeringVector | None:
        found = self._library.vector(account_id, vector_id) if self._library is not None else None
        if found is None:
            found = self._shared.get(vector_id)
        if found is None and account_id is None and vector_id in self._vectors:
            try:
                found = self._vectors.get(vector_id)
            except (OSError, ValidationError) as error:
                # The message holds the file's path.
                _logger.error("the stored vector %s can't be read: %s", vector_id, error)
                raise APIError(
                    f"The server can't read its vector {vector_id!r}: its file is damaged.", 500
                ) from error
        return self._behaviors.get(vector_id) if found is None else found

    def _behavior_vector(self, account_id: str | None, name: str) -> SteeringVector | None:
        if self._library is not None:
            vector_id = self._library.behavior_vector_id(account_id, name)
            if vector_id is not None:
                return self._library.vector(account_id, vector_id)
        return self._behaviors.get(name)

    def _to_correct(self, name: str) -> Behavior | SteeringVector:
        """What corrects a behavior: its detector with its correction, or where it has none its vector."""
        # The server's own come first: the shared account is every client's on an open server.
        found: Behavior | SteeringVector | None = self.watched.own.get(name) or self._behaviors.get(name)
        if found is None:
            found = self.watched.look_up(None, name) or self._behavior_vector(None, name)
        if isinstance(found, Behavior):
            return found
        if found is None:
            raise ValidationError(
                f"the corrected behavior {name!r} is not known: start the server with --behaviors naming its "
                "examples, or make it with POST /behaviors/create and the server's key."
            )
        self._check_fits(name, found)
        return found

    def _check_fits(self, name: str, vector: SteeringVector) -> None:
        try:
            vector.plan(self._adapter)
        except ValidationError as error:
            raise ValidationError(
                f"the vector {name} doesn't fit {self._adapter.model_id}: {error}"
            ) from error


def _part(vector: SteeringVector, layers: _Layers) -> SteeringVector:
    return vector if layers is None else vector.restricted(layers)


def _bytes_of(steering: Sequence[Steer]) -> int:
    conditions = [steer.condition.weight for steer in steering if steer.condition is not None]
    return tensor_bytes([*(tensor for steer in steering for tensor in steer.edit.tensors), *conditions])
