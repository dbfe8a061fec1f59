"""The model's thread: it reads waiting prompts, steps the batch, and does other work between steps."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable

import torch

from ..engine.models.adapter import ModelAdapter, exclusive, undisturbed
from ..engine.pauses import pausing
from ..errors import APIError, MechanexError
from .admission import pick, who_makes_way
from .alone import answer
from .batch import Batch, Outcome, Reading
from .jobs import Jobs
from .metrics import Metrics
from .probe import rolls
from .request import Generation, Result, Step
from .row import Row
from .settings import Settings
from .unanswered import Unanswered

__all__ = ["Worker"]

_logger = logging.getLogger(__name__)
_News = tuple[Generation, "Step | Result | BaseException"]
_TURN = 32  # steps before the model is offered to other threads of the process
_PATIENCE = 3  # steps that a few prompts wait for more to be read together with, while others are decoded


class Worker:
    """Owns the model; ``run`` is its thread. Others add to ``waiting`` while they hold ``changed``, and to ``jobs``.

    Args:
        adapter: the model.
        padding: a token id to fill rows with.
        settings: the limits.
        metrics: what is counted.
        loop: where generations are told their news.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        padding: int,
        settings: Settings,
        metrics: Metrics,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self.changed = threading.Condition()
        self.waiting: deque[Row] = deque()
        self.jobs = Jobs(self.changed)
        self.unanswered = Unanswered()
        self.closing = False
        self.ready = threading.Event()
        self.failure: BaseException | None = None
        self._adapter, self._padding, self._settings = adapter, padding, settings
        self._metrics, self._loop = metrics, loop
        self._batch = self._new_batch()
        self._reading: Reading | None = None
        self._alone: Row | None = None
        self._outbox: list[_News] = []
        self._rolling = True
        self._steered = 0.0
        self._steps_since_pick = 0
        self._resumed = 0.0  # when other work got the model last

    @property
    def n_running(self) -> int:
        """Requests that are read or decoded now."""
        reading = self._reading
        n_read = 0 if reading is None else len(reading.rows)
        return len(self._batch.rows) + n_read + (self._alone is not None)

    def run(self) -> None:
        """The thread's work, until ``close``."""
        end = APIError("The server is shutting down; the answer ends here.", 503)
        try:
            with exclusive(self._adapter):
                self._rolling = rolls(self._adapter)
            self.ready.set()
            while self._wait():
                self._turn()
        except BaseException as error:
            self.failure = error
            _logger.exception("the model's thread has failed")
            end = APIError("The server's model thread has failed; restart the server.", 503)
        finally:
            self._end_all(end)

    def _wait(self) -> bool:
        with self.changed:
            while not (self.closing or self.jobs or self.waiting or self._reading or self._batch.rows):
                self.changed.wait()
            return not self.closing

    def _turn(self) -> None:
        with exclusive(self._adapter):
            with undisturbed(self._adapter.hf_model), torch.no_grad():
                try:
                    for _ in range(_TURN):
                        if self.closing or not self._advance() or self.jobs:
                            break
                finally:
                    self._batch.steering.detach()
            self._work()
        self._flush()

    def _advance(self) -> bool:
        """Reads some prompts and makes one step; False when there is nothing to do."""
        self._sweep()
        if not self._rolling:
            self._answer_alone()
            return False
        read = self._read()
        stepped = bool(self._batch.rows) and self._guarded("decode", self._step)
        self._flush()
        return read or stepped

    def _read(self) -> bool:
        if self._reading is None:
            self._steps_since_pick += 1
            few = len(self.waiting) < max(1, len(self._batch.rows) // 8)
            if few and self._batch.rows and self._steps_since_pick < _PATIENCE:
                return False
            with self.changed:
                rows = pick(self.waiting, self._batch.rows, self._settings)
            if not rows:
                return False
            self._steps_since_pick = 0
            try:
                self._reading = self._batch.read(rows)
            except Exception as error:
                for row in rows:
                    self._end(row, _model_error(error))
                return False
        return self._guarded("prefill", self._read_on)

    def _read_on(self) -> None:
        reading = self._reading
        assert reading is not None
        try:
            done = self._batch.advance(reading)
        except Exception as error:
            # The batch has not seen these prompts yet and goes on without them.
            self._reading = None
            for row in reading.rows:
                self._end(row, _model_error(error))
            return
        if done:
            self._reading = None
            for row in reading.rows:
                if not row.chosen:
                    self._metrics.first_token_seconds.observe(time.monotonic() - row.arrived)
            self._metrics.prompt_tokens.inc(sum(len(row.ids) for row in reading.prompts if not row.chosen))
            try:
                outcomes = self._batch.join(reading)
            except Exception:
                self._batch.rows += [row for row in reading.rows if row not in self._batch.rows]
                raise
            self._settle(outcomes)

    def _step(self) -> None:
        self._make_room()
        self._metrics.batch_rows.observe(len(self._batch.rows))
        self._settle(self._batch.step())

    def _guarded(self, kind: str, work: Callable[[], None]) -> bool:
        """Does work on the batch; an error ends the answers in it and nothing else."""
        begun = time.perf_counter()
        try:
            work()
        except Exception as error:
            rows, self._batch = self._batch.rows, self._replaced()
            for row in rows:
                if not row.ended:  # a stream may lack its last piece
                    whole = None if row.request.stream else row.result
                    self._end(row, whole or _model_error(error))
        self._metrics.model_seconds.labels(kind).inc(time.perf_counter() - begun)
        steered = self._batch.steering.seconds
        self._metrics.steering_seconds.inc(max(steered - self._steered, 0.0))
        self._steered = steered
        return True

    def _make_room(self) -> None:
        """Sends rows back to wait where the cache has no room for another step of all."""
        while (last := who_makes_way(self._batch.rows, self._batch.columns, self._settings)) is not None:
            self._batch.drop([last])
            last.suspend()
            with self.changed:
                self.waiting.appendleft(last)

    def _sweep(self) -> None:
        """Lets go of requests whose client is gone or whose time is up."""
        now = time.monotonic()
        with self.changed:
            late = [row for row in self.waiting if row.generation.cancelled or row.deadline <= now]
            if late:
                gone = {id(row) for row in late}
                self.waiting = deque(row for row in self.waiting if id(row) not in gone)
        reading = self._reading
        if reading is not None and all(r.generation.cancelled or r.deadline <= now for r in reading.rows):
            late += reading.rows
            self._reading = None
        leaving = [row for row in self._batch.rows if row.generation.cancelled or row.deadline <= now]
        self._batch.drop(leaving)
        for row in late + leaving:
            self._end(row, _late(row))

    def _settle(self, outcomes: list[Outcome]) -> None:
        chosen = 0
        for row, news in outcomes:
            if isinstance(news, MechanexError):
                self._end(row, news)
                continue
            chosen += row.max_tokens > 0
            if news is not None:
                self._outbox.append((row.generation, news))
            if row.result is not None:
                self._end(row, row.result)
        self._metrics.completion_tokens.inc(chosen)

    def _end(self, row: Row, end: Result | MechanexError) -> None:
        row.ended = True
        self.unanswered.answered(row.generation)
        reason = end.finish_reason if isinstance(end, Result) else "error"
        self._metrics.answers.labels("cancelled" if row.generation.cancelled else reason).inc()
        self._outbox.append((row.generation, end))

    def _flush(self) -> None:
        if not self._outbox:
            return
        news, self._outbox = self._outbox, []
        try:
            self._loop.call_soon_threadsafe(_deliver, news)
        except RuntimeError:  # the loop is closed, and nobody waits any more
            _logger.debug("%d answers had no one to go to", len(news))

    def _work(self) -> None:
        """Does one piece of other work."""
        self._resumed = time.perf_counter()
        with pausing(self._take_turn):
            done = self.jobs.do_one(self._adapter)
        if done:
            self._metrics.model_seconds.labels("other").inc(time.perf_counter() - self._resumed)

    def _take_turn(self) -> None:
        """Decodes for as long as the work that pauses now had the model; ends work that nobody waits for."""
        taken = time.perf_counter() - self._resumed
        self._resumed += taken
        self._metrics.model_seconds.labels("other").inc(taken)
        if self.closing or not self.jobs.wanted:
            raise APIError("Nobody waits for this work any more.", 503)
        until = time.perf_counter() + taken
        with undisturbed(self._adapter.hf_model), torch.no_grad():
            try:
                while not self.closing and self._advance() and time.perf_counter() < until:
                    pass
            finally:
                self._batch.steering.detach()
        self._resumed = time.perf_counter()

    def _answer_alone(self) -> None:
        with self.changed:
            if not self.waiting:
                return
            row = self._alone = self.waiting.popleft()
        self._metrics.prompt_tokens.inc(len(row.ids))
        told: list[MechanexError] = []

        def tell(outcome: Outcome) -> None:
            if len(row.chosen) <= 1:
                self._metrics.first_token_seconds.observe(time.monotonic() - row.arrived)
            self._settle([outcome])
            self._flush()

        def ended() -> bool:
            if row.generation.cancelled or row.deadline <= time.monotonic():
                told.append(_late(row))
            elif self.closing:
                told.append(APIError("The server is shutting down; the answer ends here.", 503))
            return bool(told)

        begun = time.perf_counter()
        try:
            answer(self._adapter, row, self._padding, tell, ended)
        except Exception as error:
            told.append(_model_error(error))
        finally:
            self._alone = None
        if row.result is None:
            self._end(row, told[0] if told else MechanexError("The model gave no answer.", 500))
        self._metrics.batch_rows.observe(1)
        self._metrics.model_seconds.labels("alone").inc(time.perf_counter() - begun)
        self._flush()

    def _end_all(self, error: MechanexError) -> None:
        with self.changed:
            left = self.unanswered.close(error)
            self.waiting.clear()
        for generation in left:
            self._metrics.answers.labels("cancelled" if generation.cancelled else "error").inc()
            self._outbox.append((generation, error))
        self.jobs.close(error)
        self._flush()
        self._batch, self._reading = self._replaced(), None

    def _replaced(self) -> Batch:
        self._batch.steering.detach()
        self._steered = 0.0
        return self._new_batch()

    def _new_batch(self) -> Batch:
        return Batch(self._adapter, self._padding, self._settings.prefill_tokens)


def _deliver(news: list[_News]) -> None:
    for generation, one in news:
        generation.deliver(one)


def _late(row: Row) -> MechanexError:
    if row.generation.cancelled:
        return APIError("The client went away.", 499)
    return APIError("The answer took longer than the server allows; ask for fewer tokens.", 504)


def _model_error(error: Exception) -> MechanexError:
    if isinstance(error, MechanexError):
        return error
    _logger.error("the model failed", exc_info=error)
    # What it says may hold paths and sizes of the server, which are not the client's.
    return MechanexError(f"The model failed with {type(error).__name__}; the server's log has more.", 500)
