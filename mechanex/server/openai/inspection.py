"""What of the model's inside an answer has: projections and residual streams, and what steering did to its logits.

When an answer has ended, its text is read once more, edited as it was, beside the same text unsteered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from anyio.to_thread import run_sync
from torch import Tensor

from ...engine.decode.inside import Difference, ReadText, read_inside
from ...engine.intervention import unit
from ...engine.sampling import padding_token
from ...errors import NotFoundError, ValidationError
from ..http.errors import invalid
from ..library.watched import Watching
from ..model.engine import ServingEngine
from ..model.requests import Result, TextRequest
from .bodies import ActivationItem, ReturnFields

__all__ = ["Inspection"]


class Inspection:
    """What is returned for each answer of a request.

    Attributes:
        found: by the answer's index, fields of its choice.

    Args:
        engine: whose model.
        wanted: what was asked for.
        requests: one per answer.
        directions: for each item of ``wanted.activations`` the vectors' directions of norm 1 by id.
    """

    def __init__(
        self,
        engine: ServingEngine,
        wanted: ReturnFields,
        requests: Sequence[TextRequest],
        directions: Sequence[dict[str, Tensor]],
    ) -> None:
        self._engine, self._wanted, self._requests = engine, wanted, requests
        self._directions = directions
        self.found: dict[int, dict[str, Any]] = {}

    @classmethod
    async def of(
        cls,
        engine: ServingEngine,
        wanted: ReturnFields,
        requests: Sequence[TextRequest],
        watching: Watching,
        chosen: bool,
    ) -> Inspection:
        """What was asked for, checked.

        Raises:
            ValidationError: what can't be returned, with ``param`` ``return``.
        """
        if chosen:
            raise invalid("return goes with all answers that are made: leave best_of out.", "return")
        if watching.floor or (watching.behaviors and watching.action != "report"):
            raise invalid(
                "return reads an answer again with its vectors, and not with corrections of behaviors: use "
                "behavior_action 'report' or 'steer'.",
                "return",
            )
        if wanted.logit_differences is not None and not requests[0].steering:
            raise invalid("logit_differences are those of steering: name a steering_vector.", "return")
        directions = [await _directions(engine, requests[0].owner, one) for one in wanted.activations or ()]
        return cls(engine, wanted, requests, directions)

    async def read_all(self, results: Sequence[Result]) -> None:
        """Reads all answers, in order."""
        for i, result in enumerate(results):
            await self.read(i, result)

    async def read(self, index: int, result: Result) -> None:
        """Reads one answer that has ended."""
        engine, request = self._engine, self._requests[index]
        items = self._wanted.activations or ()
        layers = sorted({engine.adapter.layer_index(one.layer) for one in items})
        padding = padding_token(engine.tokenizer, [0])
        sides = 1 if self._wanted.logit_differences is None else 2
        engine.scheduler.spend_tokens(sides * (len(request.ids) + len(result.tokens)))

        work = partial(
            read_inside,
            request=replace(request, grammar=None, onlooker=None),  # which have no part in reading
            answer=result.tokens,
            layers=layers,
            most_changed=self._wanted.logit_differences,
            padding=padding,
        )
        inside = await engine.scheduler.run(work)
        self.found[index] = await run_sync(self._shown, inside, len(request.ids))

    def _shown(self, inside: ReadText, n_prompt: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        items = self._wanted.activations or ()
        if items:
            found["activations"] = [
                self._activations(one, directions, inside, n_prompt)
                for one, directions in zip(items, self._directions, strict=True)
            ]
        if self._wanted.logit_differences is not None:
            found["logit_differences"] = [self._difference(one) for one in inside.differences]
        return found

    def _activations(
        self, item: ActivationItem, directions: dict[str, Tensor], inside: ReadText, n_prompt: int
    ) -> dict[str, Any]:
        begin = 0 if item.prompt else n_prompt
        stream = inside.streams[self._engine.adapter.layer_index(item.layer)][begin:]
        told: dict[str, Any] = {"layer": item.layer, "begin": begin}
        projections = {name: stream @ direction.to(stream) for name, direction in directions.items()}
        if not all(bool(one.isfinite().all()) for one in (stream, *projections.values())):
            raise ValidationError(
                f"the residual stream at layer {item.layer} is not finite: the steering is too strong."
            )
        if directions:
            told["projections"] = {name: one.tolist() for name, one in projections.items()}
        if item.raw:
            told["raw"] = stream.tolist()
        return told

    def _difference(self, one: Difference) -> dict[str, Any]:
        texts = self._engine.token_texts
        return {
            "token": texts[one.token][0],
            "difference": one.change,
            "kl": one.kl,
            "raised": [{"token": texts[token][0], "difference": change} for token, change in one.raised],
            "lowered": [{"token": texts[token][0], "difference": change} for token, change in one.lowered],
        }


async def _directions(engine: ServingEngine, owner: Any, item: ActivationItem) -> dict[str, Tensor]:
    try:
        layer = engine.adapter.layer_index(item.layer)
        found: dict[str, Tensor] = {}
        for name in item.vector_ids or ():
            vector = await engine.steerings.vector(owner, name)
            vector.plan(engine.adapter)
            if layer not in vector:
                raise ValidationError(
                    f"the vector {name!r} has no layer {layer}: it has {list(vector.layers)}."
                )
            try:
                # The sum of squares of numbers of float32 need be none of its numbers.
                found[name] = unit(vector[layer].detach().double())
            except ValidationError as error:
                raise ValidationError(f"The vector {name!r} at layer {layer}: {error.message}") from error
        return found
    except (NotFoundError, ValidationError) as error:
        raise invalid(error.message, "return") from error
