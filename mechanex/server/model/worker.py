"""The model's thread: it reads waiting prompts, steps the batch, and does other work between steps."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, TypeVar, cast

import torch

from ...engine.capabilities.decoding import form
from ...engine.decode.calls import TOGETHER, CallForm
from ...engine.decode.decoder import Decoder, Outcome
from ...engine.decode.prefixes import Prefixes
from ...engine.decode.reading import Reading
from ...engine.decode.row import Row
from ...engine.models.adapter import ModelAdapter, exclusive, undisturbed
from ...engine.pauses import pausing
from ...engine.sae.watching import WatchingSteering
from ...errors import APIError, MechanexError
from ..http.limits import TokenQuota
from ..metrics import Metrics
from ..settings import ServerSettings
from .admission import Room, pick, who_makes_way
from .answers import Answers
from .jobs import ModelJobs
from .led import LeadingDecoder
from .requests import ServedRow, Step
from .turns import Turns

if TYPE_CHECKING:
    from .wire import Lead

__all__ = ["Worker"]

T = TypeVar("T")

_logger = logging.getLogger(__name__)
_TURN = 32  # steps before the model is offered to other threads of the process
_GATHERING = 0.003  # seconds in which those whose answers ended together may send what is next, to be read together too
_HOLD = 0.1  # seconds that a pass of other work may take as a pass of prompts; gradients take twice more
_UNTOLD = 128  # tokens of a pass of other work before that is known on a CPU
_LEAST_TOLD = 32  # tokens of a pass that says how fast the model is
_BEAT = 5.0  # seconds without work after which other processes are told that there is none
_PATIENCE = 3  # steps that a few prompts wait for more to be read together with, while others are decoded


class Worker:
    """Owns the model; ``run`` is its thread. Others add to ``waiting`` while they hold ``changed``, and to ``jobs``.

    Args:
        adapter: the model.
        padding: a token id to fill rows with.
        settings: the limits.
        metrics: what is counted.
        loop: where generations are told their news.
        quota: of which answers take their tokens, or None.
        lead: where other processes hear what is done, where the model is split over several; else None.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        padding: int,
        settings: ServerSettings,
        metrics: Metrics,
        loop: asyncio.AbstractEventLoop,
        quota: TokenQuota | None = None,
        lead: Lead | None = None,
    ) -> None:
        self.changed = threading.Condition()
        self.waiting: deque[ServedRow] = deque()
        self.jobs = ModelJobs(self.changed)
        self.answers = Answers(metrics, loop, quota)
        self.closing = False
        self.ready = threading.Event()
        self.failure: BaseException | None = None
        self._adapter, self._padding, self._settings = adapter, padding, settings
        self._metrics, self._lead = metrics, lead
        self._form: CallForm = "rolling"
        self._room = Room(1, 0)  # until the model is known
        self._prefixes = Prefixes(0)
        self._decoder = self._new_decoder()
        self._reading: Reading | None = None
        self._turns = Turns()
        self._apart: deque[ServedRow] = deque()  # whose prompts are read one by one
        self._steered = 0.0
        self._steps_since_pick = self._ended_at_pick = 0
        self._resumed = 0.0  # when other work got the model last
        # Until a pass of prompts has told how fast the model is.
        self._pass_tokens = _UNTOLD if adapter.device.type == "cpu" else None

    @property
    def n_running(self) -> int:
        """Requests that are read or decoded now."""
        reading = self._reading
        n_read = 0 if reading is None else len(reading.rows)
        return len(self._decoder.rows) + len(self._apart) + n_read

    @property
    def prefix_bytes(self) -> int:
        """Memory of the keys and values that are kept of answered requests."""
        return self._prefixes.n_bytes

    @property
    def _rows(self) -> list[ServedRow]:
        return _served(self._decoder.rows)

    def run(self) -> None:
        """The thread's work, until ``close``."""
        end = APIError("The server is shutting down; the answer ends here.", 503)
        try:
            with exclusive(self._adapter):
                self._form = self._done(partial(form, n_rows=self._settings.max_batch))
                self._room = Room.of(self._adapter, self._settings)
                self._prefixes = Prefixes(self._room.prefix_bytes)
                self._decoder = self._new_decoder()
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
        while True:
            with self.changed:
                if self.changed.wait_for(self._has_work, None if self._lead is None else _BEAT):
                    return not self.closing
            if self._lead is not None:
                self._lead.beat()

    def _has_work(self) -> bool:
        return self.closing or bool(self.jobs or self.waiting or self.n_running)

    def _turn(self) -> None:
        with exclusive(self._adapter):
            with undisturbed(self._adapter.hf_model), torch.no_grad():
                try:
                    for _ in range(_TURN):
                        if self.closing or not self._advance() or self.jobs:
                            break
                finally:
                    self._decoder.detach()
            self._flush()
            if self.jobs:
                self.answers.catch_up(self._rows)
                self.answers.flush()
            self._work()
        self.answers.flush()

    def _flush(self) -> None:
        """Sends to other processes what they were told, before this one may have no more to say for a while."""
        if self._lead is not None:
            self._lead.flush()

    def _advance(self) -> bool:
        """Reads some prompts and makes one step; False when there is nothing to do."""
        self._sweep()
        read = self._read()
        stepped = bool(self._decoder.rows) and self._guarded("decode", self._step)
        self.answers.flush()
        return read or stepped

    def _read(self) -> bool:
        if self._reading is None:
            self._steps_since_pick += 1
            few = len(self.waiting) < max(1, len(self._decoder.rows) // 8)
            if few and self._decoder.rows and self._steps_since_pick < _PATIENCE:
                return False
            self._gather()
            rows = self._pick()
            if not rows:
                return False
            self._steps_since_pick, self._ended_at_pick = 0, self.answers.n_ended
            try:
                self._reading = self._decoder.read(rows)
            except Exception as error:
                for row in rows:
                    self.answers.end(row, _model_error(error))
                return False
        return self._guarded("prefill", self._read_on)

    def _gather(self) -> None:
        """Waits a moment where nothing is decoded, and fewer requests have come than answers have ended."""
        with self.changed:
            if not self.waiting or self._decoder.rows or self._apart:
                return
            wanted = min(self.answers.n_ended - self._ended_at_pick, self._settings.max_batch)
            self.changed.wait_for(
                lambda: len(self.waiting) >= wanted or self.closing or bool(self.jobs), _GATHERING
            )

    def _pick(self) -> list[ServedRow]:
        """The requests that are read next; those that the model has no place for end here, each by itself."""
        if self._apart:
            return [self._apart.popleft()]
        most = self._settings.max_batch if self._form in TOGETHER else 1
        with self.changed:
            waiting = list(self.waiting)
        # Others only add to the queue, so who it was picked from may wait while they do.
        picked = pick(waiting, self._rows, self._settings, self._room, most, self._n_unread, self._turns)
        if picked:
            taken = {id(row) for row in picked}
            with self.changed:
                self.waiting = deque(row for row in self.waiting if id(row) not in taken)
        giver = None if picked else self._turns.who_makes_way(waiting, self._rows)
        if giver is not None:  # whoever waits gets the place with the next step
            self._read_later(giver)
        fit = []
        for row in picked:
            error = self._decoder.unfit(row)
            if error is None:
                fit.append(row)
            else:
                self.answers.end(row, error)
        return fit

    def _n_unread(self, row: ServedRow) -> int:
        return row.n_known - (0 if row.wants_prompt_logprobs else self._prefixes.n_shared(row))

    def _read_on(self) -> None:
        reading = self._reading
        assert reading is not None
        begun, before = time.perf_counter(), reading.done
        try:
            done = self._decoder.advance(reading)
        except Exception as error:
            # The batch has not seen these prompts yet and goes on without them.
            self._reading = None
            rows = _served(reading.rows)
            if len(rows) > 1:  # whoever it is that can't be read shall not end the others
                self._apart.extend(rows)
                return
            self.answers.end(rows[0], _model_error(error))
            return
        self._note_pace((reading.done - before) * len(reading.prompts), time.perf_counter() - begun)
        if done:
            self._reading = None
            for row in _served(reading.rows):
                if not row.chosen:
                    self._metrics.first_token_seconds.observe(time.monotonic() - row.arrived)
            new = [row for row in reading.prompts if not row.chosen]
            self._metrics.prompt_tokens.inc(sum(len(row.ids) - row.cached_tokens for row in new))
            for row in _served(reading.prompts):
                self._turns.note(row.sender, row.n_known - row.cached_tokens)
            try:
                outcomes = self._decoder.join(reading)
            except Exception:
                self._decoder.rows += [row for row in reading.rows if row not in self._decoder.rows]
                raise
            self._settle(outcomes)

    def _note_pace(self, tokens: int, seconds: float) -> None:
        """Learns from a pass how many tokens of other work hold up decoding for no longer than is noticed."""
        if self._adapter.device.type == "cpu" and tokens >= _LEAST_TOLD:
            fitting = int(tokens * _HOLD / max(seconds, 1e-6))
            self._pass_tokens = max(_LEAST_TOLD, (fitting + (self._pass_tokens or fitting)) // 2)

    def _step(self) -> None:
        self._make_room()
        if not self._decoder.rows:
            return
        self._metrics.batch_rows.observe(len(self._decoder.rows))
        self._settle(self._decoder.step())

    def _guarded(self, kind: str, work: Callable[[], None]) -> bool:
        """Does work on the batch; an error ends the answers in it and nothing else."""
        begun = time.perf_counter()
        before = self._rows[:]
        try:
            work()
        except Exception as error:
            rows, self._decoder = {id(row): row for row in (*before, *self._rows)}, self._replaced()
            for row in rows.values():
                if not row.ended:  # a stream may lack its last piece
                    whole = None if row.request.stream else row.result
                    self.answers.end(row, whole or _model_error(error))
        self._metrics.model_seconds.labels(kind).inc(time.perf_counter() - begun)
        steered = self._decoder.steering.seconds
        self._metrics.steering_seconds.inc(max(steered - self._steered, 0.0))
        self._steered = steered
        return True

    def _make_room(self) -> None:
        """Sends rows back to wait where the cache has no room for another step of all."""
        while (last := who_makes_way(self._rows, self._decoder.columns, self._room)) is not None:
            self._read_later(last)
        for row in _served(self._decoder.outgrown()):
            self._read_later(row)

    def _read_later(self, row: ServedRow) -> None:
        self._settle(self._decoder.catch_up())
        if row.ended:
            return
        self.answers.catch_up([row])
        self._decoder.drop([row])
        row.suspend()
        with self.changed:
            self.waiting.appendleft(row)

    def _sweep(self) -> None:
        """Lets go of requests whose client is gone or whose time is up."""
        now = time.monotonic()
        with self.changed:
            late = [row for row in self.waiting if _is_late(row, now)]
            if late:
                gone = {id(row) for row in late}
                self.waiting = deque(row for row in self.waiting if id(row) not in gone)
        reading = self._reading
        if reading is not None and all(_is_late(row, now) for row in _served(reading.rows)):
            late += _served(reading.rows)
            self._reading = None
        late += [row for row in self._apart if _is_late(row, now)]
        self._apart = deque(row for row in self._apart if not _is_late(row, now))
        for row in late:
            self.answers.end(row, _late(row))
        if any(_is_late(row, now) for row in self._rows):
            self._guarded("decode", lambda: self._let_go(now))

    def _let_go(self, now: float) -> None:
        self._settle(self._decoder.catch_up())
        leaving = [row for row in self._rows if _is_late(row, now)]
        self._decoder.drop(leaving)
        for row in leaving:
            self.answers.end(row, _late(row))

    def _settle(self, outcomes: list[Outcome]) -> None:
        chosen = 0
        for row, news in cast("list[tuple[ServedRow, Step | MechanexError | None]]", outcomes):
            if isinstance(news, MechanexError):
                self.answers.end(row, news)
                continue
            chosen += row.max_tokens > 0
            self._turns.note(row.sender, 1)
            if news is not None:
                self.answers.add(row, news)
            if row.result is not None:
                self.answers.end(row, row.result)
        self._metrics.completion_tokens.inc(chosen)

    def _work(self) -> None:
        """Does one piece of other work."""
        self._resumed = time.perf_counter()
        with pausing(self._take_turn, self._pass_tokens):
            done = self.jobs.do_one(partial(self._done, pauses=True))
        if self._lead is not None:
            self._lead.check()
        if done:
            self._metrics.model_seconds.labels("other").inc(time.perf_counter() - self._resumed)

    def _done(self, work: Callable[[ModelAdapter], T], *, pauses: bool = False) -> T:
        """What work on the model comes to, which all processes do that have a part of it."""
        if self._lead is None:
            return work(self._adapter)
        return self._lead.work(work, self._adapter, pauses=pauses, pass_tokens=self._pass_tokens)

    def _take_turn(self) -> None:
        """Decodes for as long as the work that pauses now had the model; ends work that nobody waits for."""
        taken = time.perf_counter() - self._resumed
        self._resumed += taken
        self._metrics.model_seconds.labels("other").inc(taken)
        if self.closing or not self.jobs.wanted:
            self._go_on("stop")
            raise APIError("Nobody waits for this work any more.", 503)
        until = time.perf_counter() + taken
        with undisturbed(self._adapter.hf_model), torch.no_grad():
            try:
                while not self.closing and self._advance() and time.perf_counter() < until:
                    pass
            finally:
                self._decoder.detach()
        self.answers.catch_up(self._rows)  # before the other work goes on for as long
        self.answers.flush()
        self._go_on("resume")
        self._resumed = time.perf_counter()

    def _go_on(self, how: str) -> None:
        """Lets other processes leave a pause of work as this one does."""
        if self._lead is not None:
            self._lead.tell(how)
            self._lead.flush()

    def _end_all(self, error: MechanexError) -> None:
        self.answers.catch_up(self._rows)
        with self.changed:
            self.answers.close(error)
            self.waiting.clear()
            self._apart.clear()
        self.jobs.close(error)
        self.answers.flush()
        self._decoder, self._reading = self._replaced(), None

    def _replaced(self) -> Decoder:
        self._decoder.detach()
        self._steered = 0.0
        return self._new_decoder()

    def _new_decoder(self) -> Decoder:
        """A decoder without rows; what an error left behind in kept texts is not gone on from."""
        self._prefixes.clear()
        if self._lead is not None:
            return LeadingDecoder(
                self._lead,
                self._adapter,
                self._padding,
                form=self._form,
                prefill_tokens=self._settings.prefill_tokens,
                prefixes=self._prefixes,
            )
        return Decoder(
            self._adapter,
            self._padding,
            form=self._form,
            prefixes=self._prefixes,
            prefill_tokens=self._settings.prefill_tokens,
            steering=WatchingSteering(self._adapter),
        )


def _served(rows: list[Row]) -> list[ServedRow]:
    """The decoder's rows as what they are here."""
    return cast("list[ServedRow]", rows)


def _is_late(row: ServedRow, now: float) -> bool:
    return row.generation.cancelled or row.deadline <= now


def _late(row: ServedRow) -> MechanexError:
    if row.generation.cancelled:
        return APIError("The client went away.", 499)
    return APIError("The answer took longer than the server allows; ask for fewer tokens.", 504)


def _model_error(error: Exception) -> MechanexError:
    if isinstance(error, MechanexError):
        return error
    _logger.error("the model failed", exc_info=error)
    # What it says may hold paths and sizes of the server, which are not the client's.
    return MechanexError(f"The model failed with {type(error).__name__}; the server's log has more.", 500)
