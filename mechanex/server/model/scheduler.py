"""Who is let in: requests are queued for the model's thread, refused when too many wait, and ended at shutdown."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

from ...engine.limits import check_prompt
from ...engine.models.adapter import ModelAdapter
from ...engine.sampling import padding_token
from ...errors import APIError, RateLimitError, ValidationError
from ..http.limits import TokenQuota
from ..metrics import Metrics
from ..senders import sender
from ..settings import ServerSettings
from .requests import Generation, ServedRow, TextRequest
from .worker import Worker

if TYPE_CHECKING:
    from .wire import Lead

__all__ = ["Scheduler"]

T = TypeVar("T")
_MOST_JOBS = 64  # pieces of other work that wait; a later one is refused, but for a sender who has few


class Scheduler:
    """Runs requests on a model; its methods are for the event loop's thread.

    Args:
        adapter: the model.
        tokenizer: decodes tokens; nobody else's.
        ends: ids of the tokens that end an answer.
        settings: the limits.
        metrics: what is counted.
        lead: where other processes hear what is done, where the model is split over several; else None.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        tokenizer: Any,
        ends: list[int],
        settings: ServerSettings,
        metrics: Metrics,
        lead: Lead | None = None,
    ) -> None:
        self._adapter, self._tokenizer, self._ends = adapter, tokenizer, ends
        self._settings, self._metrics, self._lead = settings, metrics, lead
        self.context = adapter.context
        per_minute = settings.account_tokens_per_minute
        self.quota = None if per_minute is None else TokenQuota(per_minute)
        self._accepting = False
        self._worker: Worker | None = None
        self._thread: threading.Thread | None = None

    @property
    def ready(self) -> bool:
        """Whether requests are taken."""
        worker = self._worker
        return worker is not None and worker.ready.is_set() and self._accepting and worker.failure is None

    @property
    def has_failed(self) -> bool:
        """Whether the model's thread has ended by an error: no request will be answered any more."""
        return self._worker is not None and self._worker.failure is not None

    @property
    def n_waiting(self) -> int:
        """Requests that wait for a place."""
        return 0 if self._worker is None else len(self._worker.waiting)

    @property
    def n_running(self) -> int:
        """Requests that are read or decoded now."""
        return 0 if self._worker is None else self._worker.n_running

    @property
    def prefix_bytes(self) -> int:
        """Memory of the keys and values that are kept of answered requests."""
        return 0 if self._worker is None else self._worker.prefix_bytes

    def start(self) -> None:
        """Starts the model's thread; call it on the event loop's thread."""
        padding = padding_token(self._tokenizer, self._ends)
        loop = asyncio.get_running_loop()
        self._worker = Worker(
            self._adapter, padding, self._settings, self._metrics, loop, self.quota, self._lead
        )
        self._accepting = True
        self._thread = threading.Thread(target=self._worker.run, name="mechanex-model", daemon=True)
        self._thread.start()

    def submit(self, request: TextRequest) -> Generation:
        """Queues one request; as ``submit_all``."""
        return self.submit_all([request])[0]

    def submit_all(self, requests: Sequence[TextRequest]) -> list[Generation]:
        """Queues requests, all or none; an empty queue takes any number, else some could never be asked for.

        ``text = (await generation.result()).text`` for the whole, ``async for step in generation`` for the pieces;
        ``generation.cancel()`` frees its place at once (harmless after the end).

        Raises:
            RateLimitError: the queue is full, or the account's tokens of this minute are used up (429, with
                ``retry_after``).
            ValidationError: an empty prompt, or one that fills the model's context (``context_length_exceeded``).
            APIError: the server is shutting down (503).
        """
        worker = self._open()
        for request in requests:
            n_ids = len(request.ids)
            if not n_ids:
                raise ValidationError(
                    "the prompt is empty and the tokenizer adds no BOS: give at least one token."
                )
            self._adapter.check_token_ids(request.ids)
            check_prompt(self._adapter, n_ids, request.max_tokens)
        deadline = time.monotonic() + self._settings.request_timeout
        rows = [
            ServedRow(
                Generation(request),
                self._tokenizer,
                self._ends,
                self.context,
                deadline,
                request.owner if isinstance(request.owner, str) else sender(),
            )
            for request in requests
        ]
        if self.quota is not None:
            for name in {row.sender for row in rows}:
                self.quota.check(name)
        with worker.changed:
            # Those whose client has gone only wait to be swept out.
            waiting = Counter(row.sender for row in worker.waiting if not row.generation.cancelled)
            if waiting and waiting.total() + len(rows) > self._settings.max_waiting:
                # One sender's requests keep no other out that has few.
                share = self._settings.max_waiting // len({*waiting, rows[0].sender})
                if waiting[rows[0].sender] + len(rows) > share:
                    raise self._full(waiting.total())
            worker.answers.promise(row.generation for row in rows)
            worker.waiting.extend(rows)
            if self.quota is not None:
                for row in rows:
                    self.quota.spend(row.sender, len(row.ids))
            worker.changed.notify()
        return [row.generation for row in rows]

    def take_tokens(self, tokens: int) -> None:
        """Counts tokens that are read for the sender and not answered.

        Raises:
            RateLimitError: the sender's tokens of this minute are used up already.
        """
        if self.quota is not None:
            self.quota.check(sender())
        self.spend_tokens(tokens)

    def spend_tokens(self, tokens: int) -> None:
        """Counts tokens that are read for the sender, whose request was let in before."""
        if self.quota is not None:
            self.quota.spend(sender(), tokens)

    async def run(self, fn: Callable[[ModelAdapter], T], timeout: float | None = None) -> T:
        """Runs ``fn(adapter)`` in the model's thread, alone on the model, between two decoding steps.

        For CAA and the like. Decoding waits meanwhile, but for the pauses of ``fn`` (see
        :mod:`mechanex.engine.pauses`), which take turns with it and end ``fn`` where nobody waits for it any more.
        Errors of ``fn`` are raised here.

        Args:
            fn: the work; where the model is split over processes all do it, so that it is a function of a module or a
                ``partial`` of one, whose arguments can be sent.
            timeout: seconds; None for the server's setting.

        Raises:
            RateLimitError: too much waits already, and an equal share of it is the sender's.
            MechanexError: it can't be sent to other processes (501).
            APIError: the server is shutting down (503), or no result in time (504).
        """
        worker = self._open()
        waiting, name = worker.jobs.wanted_by(), sender()
        if waiting.total() >= _MOST_JOBS and waiting[name] >= _MOST_JOBS // len({*waiting, name}):
            raise self._full(waiting.total())
        future: Future[T] = worker.jobs.add(fn, name)
        try:
            return await asyncio.wait_for(
                asyncio.wrap_future(future), self._settings.request_timeout if timeout is None else timeout
            )
        except asyncio.TimeoutError:
            raise APIError("The work took longer than the server allows; ask for less.", 504) from None

    def stop_accepting(self) -> None:
        """From now on requests are refused; those that are here go on."""
        self._accepting = False

    async def drain(self, seconds: float) -> None:
        """Waits for what runs, at most so long, then ends the rest with an error, and the thread; once is enough."""
        self.stop_accepting()
        worker = self._worker
        if worker is None or worker.closing:
            return
        end = time.monotonic() + seconds
        while (
            (worker.waiting or worker.n_running or worker.jobs.busy) and time.monotonic() < end and self.alive
        ):
            await asyncio.sleep(0.02)
        with worker.changed:
            worker.closing = True
            worker.changed.notify()
        worker.jobs.give_up_running(APIError("The server is shutting down; the work ends here.", 503))
        end = time.monotonic() + 2
        while self.alive and time.monotonic() < end:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0)

    @property
    def alive(self) -> bool:
        """Whether the model's thread runs: after ``drain``, only while it does work that can't be stopped."""
        return self._thread is not None and self._thread.is_alive()

    def _open(self) -> Worker:
        worker = self._worker
        if worker is not None and worker.failure is not None:
            raise APIError("The server's model thread has failed; restart the server.", 503)
        if worker is None or not self._accepting:
            raise APIError("The server is shutting down; try another one.", 503)
        return worker

    def _full(self, n: int) -> RateLimitError:
        return RateLimitError(
            f"{n} requests wait already, about as many as this server lets wait; try again later.",
            429,
            retry_after=float(min(30, 1 + n // max(self._settings.max_batch, 1))),
        )
