"""vLLM's worker, with a residual stream that each request may have edited. For vLLM's ``worker_cls``."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .._private.vllm import VERSION, Steps, follow, loaded_model, run_alone, worker_class
from ..engine.intervention import Edit
from ..errors import ValidationError
from .asked import FIELD, edits_of
from .capacity import Capacity
from .plan import PlacedEdit, RequestRead, plan_step
from .slots import Slots
from .stream import SteeredStream, check_edits, decoder_layers
from .supported import check_config, check_version
from .units import key_of, unpacked

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
        layers = [
            None if type(layer).__name__ == "PPMissingLayer" else layer
            for layer in decoder_layers(model, n_layers)
        ]
        width, dtype = config.model_config.get_hidden_size(), config.model_config.dtype
        n_tokens = config.scheduler_config.max_num_batched_tokens + _PADDING
        capacity = Capacity.of(config.additional_config)
        self._stream = SteeredStream(layers, width, capacity, n_tokens, self.device, dtype)
        here = [layer for layer in layers if layer is not None]
        with run_alone(config, here):
            takes_two = {id(layer): _takes_two(layer, width, dtype, self.device) for layer in here}
        self._stream.wrap(layers, lambda layer: takes_two[id(layer)])
        self._form = "a sum of two tensors" if any(takes_two.values()) else "one tensor"
        self._edits: dict[str, Mapping[int, Edit]] = {}
        self._slots = Slots(capacity.slots)
        follow(self.model_runner, self._begin, self._stream.clear, is_v2=config.use_v2_model_runner)

    def steering_register(self, data: bytes) -> str:
        """Keeps packed edits for requests that name them by the hash of their content, which it returns."""
        key = key_of(data)
        if key not in self._edits:
            edits = unpacked(data)
            check_edits(edits, self._stream.width, self._stream.n_layers, self._stream.capacity)
            self._edits[key] = edits
        return key

    def steering_form(self) -> str:
        """How the model's layers give the residual stream."""
        return self._form

    def _begin(self, steps: Steps) -> None:
        """Puts the edits of a step's requests into the tables, and each token's places into the rows."""
        for request_id in self._slots.holders:
            if not steps.knows(request_id):
                self._slots.release(request_id)
        readings = []
        for request_id, computed, scheduled, prompt_length in steps.reads():
            text = steps.extra_args(request_id).get(FIELD)
            edits = edits_of(text) if text else ()
            filled = self._slots.acquire(request_id, [one.key for one in edits]) if edits else {}
            for key, slot in filled.items():
                if key not in self._edits:
                    raise ValidationError(
                        f"request {request_id} asks for edits {key} that this engine was never given; they come from "
                        "mechanex.vllm.LLM or its middleware."
                    )
                self._stream.fill(slot, self._edits[key])
            placed = [PlacedEdit(self._slots.slot(one.key), one.strength, one.tokens) for one in edits]
            readings.append(RequestRead(computed, scheduled, prompt_length, placed))
        self._stream.stage(plan_step(readings, self._stream.capacity.per_token))


def _takes_two(layer: nn.Module, width: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a layer takes the stream as the sum of two tensors: then what was NaN in the second is NaN afterwards.
    Some take a second one and don't read it.

    Raises:
        ValidationError: the layer can't be called alone, so it isn't known.
    """
    parameters = inspect.signature(layer.forward).parameters
    if not any(name.startswith("residual") for name in parameters):
        return False
    hidden = torch.zeros(2, width, dtype=dtype, device=device)
    given: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        if name.startswith("position"):
            given[name] = torch.arange(2, device=device)
        elif name.startswith("residual"):
            given[name] = torch.full_like(hidden, float("nan"))
        elif name.startswith("hidden"):
            given[name] = hidden
        elif parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD:
            raise ValidationError(
                f"{type(layer).__name__} is given {name!r}, and how it takes the residual stream is not known: this "
                "model can't be steered in vLLM."
            )
    out = layer(**given)
    return isinstance(out, tuple) and bool(out[1].isnan().all())
