"""vLLM's scheduler, with requests that wait for room in the tables, and a prefix cache that knows steering.

For vLLM's ``scheduler_cls``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from .._private.vllm import STOPPED, VERSION, ended_in, salt_blocks, scheduler_class
from .asked import FIELD, AskedEdit, block_salt, edits_of
from .capacity import Capacity
from .slots import Slots
from .supported import check_version
from .watched import SHOWED, WATCH_FIELD, watch_of

__all__ = ["steering_scheduler"]


def steering_scheduler(*, vllm_config: Any, **options: Any) -> Any:
    """The scheduler that vLLM would take, with steering; arguments as there."""
    check_version(VERSION)
    salt_blocks(_salt)
    return _on(scheduler_class(vllm_config))(vllm_config=vllm_config, **options)


def _said(request: Any) -> Mapping[str, Any]:
    params = request.sampling_params
    return (params and params.extra_args) or {}


def _asked(request: Any) -> tuple[AskedEdit, ...]:
    text = _said(request).get(FIELD)
    return edits_of(text) if text else ()


def _salt(request: Any, start: int, stop: int) -> Sequence[str]:
    parts = block_salt(_asked(request), start, stop, request.num_prompt_tokens)
    text = _said(request).get(WATCH_FIELD)
    if text and stop > request.num_prompt_tokens and watch_of(text).alters:
        parts.append(f"{WATCH_FIELD}:{request.request_id}")  # what is corrected is known to this answer alone
    return parts


@cache
def _on(base: Any) -> Any:
    class SteeringScheduler(base):  # type: ignore[misc]
        """Requests whose edits find no slot are held back, in the order in which they came."""

        def __init__(self, *, vllm_config: Any, **options: Any) -> None:
            super().__init__(vllm_config=vllm_config, **options)
            self._slots = Slots(Capacity.of(vllm_config.additional_config).slots)
            self._held: deque[Any] = deque()
            self._ended: frozenset[str] = frozenset()

        def add_request(self, request: Any) -> None:
            if not self._held and self._admit(request):
                return
            if _asked(request):
                self._held.append(request)
            else:
                super().add_request(request)

        def _admit(self, request: Any) -> bool:
            keys = [one.key for one in _asked(request)]
            if not self._slots.fits(keys):
                return False
            if keys:
                self._slots.acquire(request.request_id, keys)
            super().add_request(request)
            return True

        def schedule(self, *args: Any, **kwargs: Any) -> Any:
            while self._held and self._admit(self._held[0]):
                self._held.popleft()
            return super().schedule(*args, **kwargs)

        def finish_requests(self, request_ids: Any, finished_status: Any) -> Any:
            given = (request_ids,) if isinstance(request_ids, str) else request_ids
            given = None if given is None else set(given)
            gone = [one for one in self._held if given is None or one.request_id in given]
            for one in gone:
                self._held.remove(one)
                one.status = finished_status
            return [*super().finish_requests(given, finished_status), *gone]

        def _free_request(self, request: Any, *args: Any, **kwargs: Any) -> Any:
            freed = super()._free_request(request, *args, **kwargs)
            self._slots.release(request.request_id)
            return freed

        def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
            self._ended = ended_in(model_runner_output)
            return super().update_from_output(scheduler_output, model_runner_output)

        def _update_request_with_output(self, request: Any, new_token_ids: list[int], **kwargs: Any) -> Any:
            if request.request_id not in self._ended:
                return super()._update_request_with_output(request, new_token_ids, **kwargs)
            # The answer ends with the token before, in which a behavior showed.
            request.status = STOPPED
            request.stop_reason = SHOWED
            return [], True

        def get_num_unfinished_requests(self) -> int:
            paused = self.pause_state.name != "UNPAUSED"
            return int(super().get_num_unfinished_requests()) + (0 if paused else len(self._held))

        def get_request_counts(self) -> tuple[int, int]:
            running, waiting = super().get_request_counts()
            return running, waiting + len(self._held)

    return SteeringScheduler
