"""vLLM's two model runners: what each of their steps reads. Importing this imports no vLLM."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from ..errors import ValidationError

__all__ = ["Steps", "follow"]


class Steps(Protocol):
    """The steps of a model runner."""

    def reads(self) -> list[tuple[str, int, int, int]]:
        """What the step that begins reads: for each request in the order of the tokens its id, how many of its
        tokens were read before, how many are read now, and how many its prompt has."""

    def extra_args(self, request_id: str) -> Mapping[str, Any]:
        """A request's ``SamplingParams.extra_args``."""

    def knows(self, request_id: str) -> bool:
        """Whether the request hasn't ended."""


def follow(runner: Any, begin: Callable[[Steps], None], end: Callable[[], None], *, is_v2: bool) -> None:
    """Has ``begin`` called before each pass of a loaded model runner over requests, and ``end`` after it.

    Passes that serve no request, such as warm-ups, aren't followed. The V2 runner has no place after a pass: there
    ``end`` is called before the next one.

    Raises:
        ValidationError: the runner hasn't the places that this hangs on.
    """
    if is_v2:
        _follow_v2(runner, begin, end)
        return
    steps = _V1Steps(runner)
    inner = runner._model_forward

    def followed(*args: Any, **kwargs: Any) -> Any:
        begin(steps)
        try:
            return inner(*args, **kwargs)
        finally:
            end()

    runner._model_forward = followed


class _V1Steps:
    def __init__(self, runner: Any) -> None:
        self._runner = runner

    def reads(self) -> list[tuple[str, int, int, int]]:
        batch = self._runner.input_batch
        n = batch.num_reqs
        begins = self._runner.query_start_loc.np[: n + 1].tolist()
        computed = batch.num_computed_tokens_cpu[:n].tolist()
        prompts = batch.num_prompt_tokens[:n].tolist()
        return [
            (request_id, computed[i], begins[i + 1] - begins[i], prompts[i])
            for i, request_id in enumerate(batch.req_ids[:n])
        ]

    def extra_args(self, request_id: str) -> Mapping[str, Any]:
        params = self._runner.requests[request_id].sampling_params
        return (params and params.extra_args) or {}

    def knows(self, request_id: str) -> bool:
        return request_id in self._runner.requests


class _V2Steps:
    """The requests of the V2 runner, told by its model state."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[int, Mapping[str, Any]]] = {}
        self._batch: Any = None

    def add(self, data: Any) -> None:
        """Takes in a request, vLLM's ``NewRequestData``; a preempted one comes again, its prompt as it was."""
        params = data.sampling_params
        self._known[data.req_id] = data.prompt_len, (params and params.extra_args) or {}

    def remove(self, request_id: str) -> None:
        """Forgets one."""
        self._known.pop(request_id, None)

    def begin(self, batch: Any) -> bool:
        """Begins a step with vLLM's ``InputBatch``; False where it serves no request.

        Raises:
            ValidationError: it reads a request that wasn't told of beside others that were.
        """
        self._batch = batch
        unknown = [one for one in batch.req_ids[: batch.num_reqs] if one not in self._known]
        if unknown and len(unknown) < batch.num_reqs:
            raise ValidationError(
                f"vLLM's V2 model runner reads the request {unknown[0]!r}, which it didn't tell of: its steering isn't "
                "known, and nothing runs unsteered. Start with VLLM_USE_V2_MODEL_RUNNER=0."
            )
        return not unknown

    def reads(self) -> list[tuple[str, int, int, int]]:
        batch, n = self._batch, self._batch.num_reqs
        computed = batch.num_computed_tokens_np[:n].tolist()
        scheduled = batch.num_scheduled_tokens[:n].tolist()
        return [
            (request_id, computed[i], scheduled[i], self._known[request_id][0])
            for i, request_id in enumerate(batch.req_ids[:n])
        ]

    def extra_args(self, request_id: str) -> Mapping[str, Any]:
        return self._known[request_id][1]

    def knows(self, request_id: str) -> bool:
        return request_id in self._known


def _follow_v2(runner: Any, begin: Callable[[Steps], None], end: Callable[[], None]) -> None:
    state, steps = getattr(runner, "model_state", None), _V2Steps()
    base: Any = type(state)
    missing = [
        name for name in ("add_request", "remove_request", "prepare_inputs") if not hasattr(state, name)
    ]
    if missing:
        raise ValidationError(
            f"the model state of vLLM's V2 model runner, {base.__name__}, has no {missing[0]}, by which requests are "
            "told of: start with VLLM_USE_V2_MODEL_RUNNER=0."
        )

    class SteeringModelState(base):  # type: ignore[misc]
        def add_request(self, req_index: int, new_req_data: Any) -> None:
            steps.add(new_req_data)
            super().add_request(req_index, new_req_data)

        def remove_request(self, req_id: str) -> None:
            steps.remove(req_id)
            super().remove_request(req_id)

        def prepare_inputs(self, input_batch: Any, req_states: Any) -> Any:
            end()
            if steps.begin(input_batch):
                begin(steps)
            return super().prepare_inputs(input_batch, req_states)

    # The runner makes its state while the model is loaded, and hands it on: it stays the same object.
    state.__class__ = SteeringModelState
