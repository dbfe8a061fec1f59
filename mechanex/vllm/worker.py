"""vLLM's worker, with a residual stream that each request may have edited. For vLLM's ``worker_cls``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .._private.vllm import (
    VERSION,
    is_elsewhere,
    layer_calls,
    loaded_model,
    with_ended,
    worker_class,
)
from .._private.vllm_steps import Steps, follow
from ..engine.intervention import Edit
from ..engine.sae.behavior import Behavior
from ..engine.sae.watching import Watch
from ..errors import ValidationError
from .asked import FIELD, edits_of
from .capacity import Capacity
from .forms import LayerCall, takes_two
from .held import OwnedUnits
from .plan import PlacedEdit, RequestRead, plan_step
from .slots import Slots
from .stream import SteeredStream, check_edits, decoder_layers
from .supported import check_config, check_version, why_unwatched
from .units import Unit, unpacked_unit
from .watched import WATCH_FIELD, WatchedRead, Watches, watch_of

__all__ = ["SteeringWorker"]

_PADDING = 1024  # tokens by which a captured graph may be larger than the largest batch

_Base: Any = worker_class()


class SteeringWorker(_Base):  # type: ignore[misc]
    """The worker of this platform; its model's layers edit the stream that they leave behind."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Loads the model and wraps its layers, before it is profiled, compiled or captured."""
        check_version(VERSION)
        check_config(self.vllm_config)
        super().load_model(*args, **kwargs)
        config = self.vllm_config
        model = loaded_model(self.model_runner)
        n_layers = config.model_config.get_total_num_hidden_layers()
        layers = [None if is_elsewhere(layer) else layer for layer in decoder_layers(model, n_layers)]
        width, dtype = config.model_config.get_hidden_size(), config.model_config.dtype
        n_tokens = config.scheduler_config.max_num_batched_tokens + _PADDING
        capacity = Capacity.of(config.additional_config)
        self._stream = SteeredStream(layers, width, capacity, n_tokens, self.device, dtype)
        here = [layer for layer in layers if layer is not None]
        with layer_calls(model, config, here, self.device) as calls:
            two = takes_two(here, [LayerCall(*call) for call in calls], width)
        self._stream.wrap(layers, dict(zip(here, two, strict=True)).__getitem__)
        self._form = "a sum of two tensors" if any(two) else "one tensor"
        self._units = OwnedUnits(self._read)
        self._watches = Watches()
        self._unwatched = why_unwatched(config)
        self._slots = Slots(capacity.slots)
        follow(self.model_runner, self._begin, self._stream.clear, is_v2=config.use_v2_model_runner)

    def steering_register(self, key: str, data: bytes, owner: str) -> None:
        """Keeps packed edits, or a behavior, for requests that name them by their key, until their owner has them
        forgotten."""
        self._units.add(key, data, owner)

    def steering_forget(self, keys: Sequence[str], owner: str) -> None:
        """Ends an owner's hold on edits and behaviors; no request that runs or waits to may need them."""
        self._units.forget(keys, owner)

    def steering_seen(self, name: str) -> list[dict[str, Any]]:
        """What was seen in the answers of the watched request of this name; once."""
        return self._watches.take(name)

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        """Chooses tokens, and tells the scheduler whose answers end before theirs."""
        return with_ended(super().sample_tokens(*args, **kwargs), self._watches.ending)

    def _read(self, data: bytes) -> Unit:
        unit = unpacked_unit(data)
        if not isinstance(unit, Behavior):
            check_edits(unit, self._stream.width, self._stream.n_layers, self._stream.capacity)
        return unit

    def steering_form(self) -> str:
        """How the model's layers give the residual stream."""
        return self._form

    def _begin(self, steps: Steps) -> None:
        """Puts the edits of a step's requests into the tables, and each token's places into the rows."""
        for request_id in self._slots.holders:
            if not steps.knows(request_id):
                self._slots.release(request_id)
        self._watches.release(steps.knows)
        readings, watched, begin = [], [], 0
        for request_id, computed, scheduled, prompt_length in steps.reads():
            said = steps.extra_args(request_id)
            edits = edits_of(said[FIELD]) if FIELD in said else ()
            filled = self._slots.acquire(request_id, [one.key for one in edits]) if edits else {}
            for key, slot in filled.items():
                self._stream.fill(slot, self._edits(request_id, key))
            placed = [PlacedEdit(self._slots.slot(one.key), one.strength, one.tokens) for one in edits]
            readings.append(RequestRead(computed, scheduled, prompt_length, placed))
            if WATCH_FIELD in said:
                watch = self._watch(request_id, said[WATCH_FIELD])
                watched.append(WatchedRead(watch, begin, scheduled, computed - prompt_length))
            begin += scheduled
        self._stream.stage(plan_step(readings, self._stream.capacity.per_token))
        self._stream.watched.stage(watched)

    def _edits(self, request_id: str, key: str) -> Mapping[int, Edit]:
        unit = self._units.get(key)
        if unit is None or isinstance(unit, Behavior):
            raise _never_given(request_id, key)
        return unit

    def _watch(self, request_id: str, text: str) -> Watch:
        if self._unwatched is not None:
            raise ValidationError(self._unwatched)

        def behavior_of(key: str) -> Behavior:
            unit = self._units.get(key)
            if not isinstance(unit, Behavior):
                raise _never_given(request_id, key)
            return unit

        return self._watches.of(request_id, watch_of(text), behavior_of)


def _never_given(request_id: str, key: str) -> ValidationError:
    return ValidationError(
        f"request {request_id} asks for {key}, which this engine was never given; such requests come from "
        "mechanex.vllm.LLM or its middleware."
    )
