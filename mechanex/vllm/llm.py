"""vLLM's ``LLM`` with steering for each prompt."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from ..engine.models.sources import find_source
from ..errors import ValidationError
from .asked import FIELD
from .capacity import Capacity
from .engine_vectors import EngineVectors, SteerBy
from .supported import SCHEDULER, WORKER, check_config, check_installed, check_version

__all__ = ["LLM"]


class LLM:
    """A model in vLLM, of whose prompts each may be steered in its own way.

    Args:
        model: a bundled name, a folder or a name of the Hub.
        steering_slots: different vectors that prompts which are being answered may have between them; others wait.
        steering_per_token: most vectors of one prompt; a SteeringVector that clamps counts twice.
        steering_rank: largest rank of an edit: 0 where vectors are only added, 1 for ablating and clamping.
        steering_gates: whether edits may have gates.
        **options: those of ``vllm.LLM``.

    Attributes:
        engine: the ``vllm.LLM``.

    Raises:
        ValidationError: vLLM is missing or of another version, or an option that steering wasn't tested with.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        steering_slots: int = 64,
        steering_per_token: int = 4,
        steering_rank: int = 1,
        steering_gates: bool = False,
        **options: Any,
    ) -> None:
        capacity = Capacity(steering_slots, steering_per_token, steering_rank, steering_gates)
        check_installed()
        os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
        from .._private.vllm import VERSION, engine_config, llm_class

        check_version(VERSION)
        options = steered_options(find_source(model).location, capacity, options)
        check_config(engine_config(options))
        self.engine = llm_class()(**options)
        self._vectors = vectors_of(self.engine.llm_engine.vllm_config)

    def register(self, vector: object, vector_id: str | None = None) -> str:
        """Takes a vector in, and gives the id by which prompts name it.

        Args:
            vector: a SteeringVector, or ``{layer: tensor or Edit}``.
            vector_id: its id; None for a hash of its content.

        Raises:
            ValidationError: it doesn't fit the model or the tables.
        """
        return self._vectors.add(vector, vector_id)

    def unregister(self, vector_id: str) -> None:
        """Forgets a vector.

        Raises:
            NotFoundError: nobody registered it.
        """
        self._vectors.remove(vector_id)

    def generate(
        self,
        prompts: Any,
        sampling_params: Any = None,
        *,
        steering: SteerBy | Sequence[SteerBy | Sequence[SteerBy] | None] | None = None,
        **options: Any,
    ) -> list[Any]:
        """What ``vllm.LLM.generate`` answers, each prompt steered.

        Args:
            prompts: one, or a list.
            sampling_params: one for all, or one for each prompt.
            steering: one SteerBy for all prompts; or a list with one for each, of which each is a SteerBy, several, or
                None.
            **options: those of ``vllm.LLM.generate``.

        Raises:
            NotFoundError: an id that nobody registered.
            ValidationError: lists that don't fit together, or what a vector hasn't.
        """
        prompts = [prompts] if isinstance(prompts, (str, Mapping)) else list(prompts)
        return self._steered(self.engine.generate, prompts, sampling_params, steering, options)

    def chat(
        self,
        messages: Any,
        sampling_params: Any = None,
        *,
        steering: SteerBy | Sequence[SteerBy | Sequence[SteerBy] | None] | None = None,
        **options: Any,
    ) -> list[Any]:
        """What ``vllm.LLM.chat`` answers, each conversation steered; otherwise as ``generate``."""
        conversations = list(messages)
        if conversations and isinstance(conversations[0], Mapping):
            conversations = [conversations]
        return self._steered(self.engine.chat, conversations, sampling_params, steering, options)

    def _steered(
        self, answer: Any, asked: list[Any], params: Any, steering: Any, options: dict[str, Any]
    ) -> list[Any]:
        if params is None:
            params = self.engine.get_default_sampling_params()
        each = list(params) if isinstance(params, Sequence) else [params] * len(asked)
        wanted = (
            [steering] * len(asked) if steering is None or isinstance(steering, SteerBy) else list(steering)
        )
        for name, given in (("sampling_params", each), ("steering", wanted)):
            if len(given) != len(asked):
                raise ValidationError(f"there are {len(asked)} prompts and {len(given)} {name}.")
        found = [self._vectors.asked(one) for one in wanted]
        steered = [with_steering(one, asked.text) for one, asked in zip(each, found, strict=True)]
        held = self._vectors.held
        with held.lease(key for one in found for key in one.keys):
            for one in found:
                for key, data in one.missing.items():
                    self.engine.collective_rpc("steering_register", args=(key, data, held.owner))
                    held.sent(key, len(data))
            if surplus := held.surplus():
                self.engine.collective_rpc("steering_forget", args=(surplus, held.owner))
            answers: list[Any] = answer(asked, steered, **options)
        return answers


def steered_options(model: str, capacity: Capacity, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of vLLM's engine with which it steers.

    Raises:
        ValidationError: some say otherwise.
    """
    ours = {"worker_cls": WORKER, "scheduler_cls": SCHEDULER}
    for name, value in ours.items():
        if options.get(name, value) != value:
            raise ValidationError(f"{name} is {value!r} where mechanex steers; got {options[name]!r}.")
    additional = {**(options.get("additional_config") or {}), **capacity.config()}
    return {**options, **ours, "model": model, "additional_config": additional}


def with_steering(params: Any, text: str | None) -> Any:
    """A copy of sampling parameters that carries a request's edits.

    Raises:
        ValidationError: they carry some already.
    """
    if FIELD in (params.extra_args or {}):
        raise ValidationError(f"extra_args[{FIELD!r}] is mechanex's own: say what steers by steering=.")
    if text is None:
        return params
    params = params.clone()
    params.extra_args = {**(params.extra_args or {}), FIELD: text}
    return params


def vectors_of(config: Any) -> EngineVectors:
    """Vectors, none yet, for an engine of this configuration."""
    model = config.model_config
    return EngineVectors(
        model.get_hidden_size(),
        model.get_total_num_hidden_layers(),
        Capacity.of(config.additional_config),
        getattr(model.hf_text_config, "model_type", None),
    )
