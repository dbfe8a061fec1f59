"""vLLM's ``LLM`` with steering for each prompt."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import NoneType
from typing import Any

from ..engine.models.sources import find_source
from ..engine.sae.behavior import Behavior
from ..engine.sae.store import BEHAVIOR_FILE, BehaviorStore, read_behavior
from ..engine.sae.watching import Seen
from ..errors import NotFoundError, ValidationError
from .asked import FIELD, Carried
from .capacity import Capacity
from .engine_behaviors import EngineBehaviors, WatchBy
from .engine_vectors import EngineVectors, SteerBy
from .supported import SCHEDULER, WORKER, check_config, check_installed, check_version
from .watched import SHOWED, WATCH_FIELD

__all__ = ["LLM"]


class LLM:
    """A model in vLLM, of whose prompts each may be steered in its own way.

    Args:
        model: a bundled name, a folder or a name of the Hub.
        steering_slots: different vectors that prompts which are being answered may have between them; others wait.
        steering_per_token: most vectors of one prompt; a SteeringVector that clamps counts twice.
        steering_rank: largest rank of an edit: 0 where vectors are only added, 1 for ablating and clamping.
        steering_gates: whether edits may have gates.
        steering_behaviors: whether answers may be watched where the model is compiled; with ``enforce_eager`` they may
            anyway.
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
        steering_behaviors: bool = False,
        **options: Any,
    ) -> None:
        capacity = Capacity(
            steering_slots, steering_per_token, steering_rank, steering_gates, steering_behaviors
        )
        check_installed()
        os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
        from .._private.vllm import VERSION, engine_config, llm_class

        check_version(VERSION)
        options = steered_options(find_source(model).location, capacity, options)
        check_config(engine_config(options))
        self.engine = llm_class()(**options)
        config = self.engine.llm_engine.vllm_config
        self._vectors = vectors_of(config)
        self._watcher = EngineBehaviors(config, self._vectors.held)
        self._behaviors: dict[str, Behavior] = {}

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

    def register_behavior(self, behavior: Behavior | str | os.PathLike[str]) -> str:
        """Takes a behavior in, and gives the name by which prompts have it watched.

        Args:
            behavior: one, its file, or the name of one that ``create_behavior`` has kept on this machine. Another
                behavior of its name makes way.

        Raises:
            NotFoundError: there is no such behavior.
            ValidationError: it is another model's, or isn't read in the residual stream.
        """
        if isinstance(behavior, str) and not behavior.endswith(BEHAVIOR_FILE):
            behavior = BehaviorStore().get(behavior)
        elif not isinstance(behavior, Behavior):
            path = Path(behavior)
            if not path.is_file():
                raise NotFoundError(f"there is no file {path}, which was to hold a behavior.")
            behavior = read_behavior(path)
        self._watcher.check(behavior)
        self._behaviors[behavior.name] = behavior
        return behavior.name

    def generate(
        self,
        prompts: Any,
        sampling_params: Any = None,
        *,
        steering: SteerBy | Sequence[SteerBy | Sequence[SteerBy] | None] | None = None,
        watching: WatchBy | Sequence[WatchBy | None] | None = None,
        **options: Any,
    ) -> list[Any]:
        """What ``vllm.LLM.generate`` answers, each prompt steered.

        Args:
            prompts: one, or a list.
            sampling_params: one for all, or one for each prompt.
            steering: one SteerBy for all prompts; or a list with one for each, of which each is a SteerBy, several, or
                None.
            watching: what is watched in the answers; one for all, or one or None for each. The outputs of a watched
                answer have ``seen``, what was seen of each token that was read, in order, and the ``finish_reason``
                ``"behavior"`` where it was ended.
            **options: those of ``vllm.LLM.generate``.

        Raises:
            NotFoundError: an id or a name that nobody registered.
            ValidationError: lists that don't fit together, what a vector hasn't, or several watched answers of one
                prompt (``n``).
        """
        prompts = [prompts] if isinstance(prompts, (str, Mapping)) else list(prompts)
        return self._steered(self.engine.generate, prompts, sampling_params, steering, watching, options)

    def chat(
        self,
        messages: Any,
        sampling_params: Any = None,
        *,
        steering: SteerBy | Sequence[SteerBy | Sequence[SteerBy] | None] | None = None,
        watching: WatchBy | Sequence[WatchBy | None] | None = None,
        **options: Any,
    ) -> list[Any]:
        """What ``vllm.LLM.chat`` answers, each conversation steered; otherwise as ``generate``."""
        conversations = list(messages)
        if conversations and isinstance(conversations[0], Mapping):
            conversations = [conversations]
        return self._steered(self.engine.chat, conversations, sampling_params, steering, watching, options)

    def _steered(
        self,
        answer: Any,
        asked: list[Any],
        params: Any,
        steering: Any,
        watching: Any,
        options: dict[str, Any],
    ) -> list[Any]:
        if params is None:
            params = self.engine.get_default_sampling_params()
        each = _for_each("sampling_params", params, asked, isinstance(params, Sequence))
        steered = _for_each("steering", steering, asked, not isinstance(steering, (SteerBy, NoneType)))
        watched = _for_each("watching", watching, asked, not isinstance(watching, (WatchBy, NoneType)))
        held = self._vectors.held
        names: dict[int, str] = {}
        with ExitStack() as leases:
            for i, (by, watching) in enumerate(zip(steered, watched, strict=True)):
                carried = self._vectors.asked(by)
                if watching is not None:
                    if (each[i].n or 1) > 1:
                        raise ValidationError("of a watched prompt there is one answer: give it n=1.")
                    more, names[i] = self._watch(watching)
                    carried += more
                each[i] = with_steering(each[i], carried.fields)
                leases.enter_context(held.lease(carried.keys))
                for (
                    key,
                    data,
                ) in carried.missing.items():  # sent at once, so that the next prompt finds it held
                    self.engine.collective_rpc("steering_register", args=(key, data, held.owner))
                    held.sent(key, len(data))
            if surplus := held.surplus():
                self.engine.collective_rpc("steering_forget", args=(surplus, held.owner))
            answers: list[Any] = answer(asked, each, **options)
            for i, name in names.items():
                (seen,) = self.engine.collective_rpc("steering_seen", args=(name,))[0] or ({"tokens": ()},)
                output = answers[i].outputs[0]
                output.seen = [Seen(scores, tuple(d), tuple(c)) for scores, d, c in seen["tokens"]]
                if output.stop_reason == SHOWED:
                    output.finish_reason, output.stop_reason = "behavior", None
        return answers

    def _watch(self, watching: WatchBy) -> tuple[Carried, str]:
        names = [watching.behaviors] if isinstance(watching.behaviors, str) else list(watching.behaviors)
        for name in names:
            if name not in self._behaviors:
                raise NotFoundError(
                    f"no behavior has the name {name!r} here: register_behavior takes one in."
                )
        behaviors = [self._behaviors[name] for name in dict.fromkeys(names)]
        return self._watcher.asked(behaviors, watching.action, told=True)


def _for_each(name: str, given: Any, asked: Sequence[Any], is_list: bool) -> list[Any]:
    """One thing for each prompt.

    Raises:
        ValidationError: a list of another length.
    """
    each = list(given) if is_list else [given] * len(asked)
    if len(each) != len(asked):
        raise ValidationError(f"there are {len(asked)} prompts and {len(each)} {name}.")
    return each


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


def with_steering(params: Any, fields: Mapping[str, str]) -> Any:
    """A copy of sampling parameters that carries what a request asks for.

    Raises:
        ValidationError: they carry some already.
    """
    for name, asked in ((FIELD, "steering="), (WATCH_FIELD, "watching=")):
        if name in (params.extra_args or {}):
            raise ValidationError(f"extra_args[{name!r}] is mechanex's own: say what you want by {asked}.")
    if not fields:
        return params
    params = params.clone()
    params.extra_args = {**(params.extra_args or {}), **fields}
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
