"""A process of a split model's server that isn't the first: it follows the first one's steps until that ends."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch

from ...engine.decode.calls import CallForm
from ...engine.decode.prefixes import Prefixes
from ...engine.decode.reading import Reading
from ...engine.models.adapter import ModelAdapter, exclusive, undisturbed
from ...engine.pauses import pausing
from ...errors import APIError, MechanexError
from .led import LedDecoder, LedRow, facts
from .wire import Led, Parted

__all__ = ["follow"]

_logger = logging.getLogger(__name__)
_ENDING = timedelta(minutes=1)  # from work's end here to that in the first process
_FAILING = timedelta(seconds=10)  # from a pass's failure here to that in the first process


def follow(adapter: ModelAdapter, led: Led) -> None:
    """Does with the model what the first process does with its part, until that ends.

    Ctrl-C and SIGTERM, which all processes of a job get, are the first one's to answer meanwhile. Where that ends while
    the model is at work, so does this process, with exit code 0.

    Args:
        adapter: this process's part.
        led: where the first process is heard.

    Raises:
        MechanexError: the first process is gone, or something is done here in another way than there.
    """
    try:
        with (
            _deaf(),
            led.ending_with_first(),
            exclusive(adapter),
            contextlib.closing(_Follower(adapter, led)) as follower,
        ):
            follower.until("end")
    except Parted as error:
        if not led.first_has_left:
            raise MechanexError(str(error)) from error
        _logger.info("the first process has ended in the midst of work, and so does this one: %s", error)
        led.leave()


class _FirstFailed(Exception):
    """The first process has failed where this one still waits for its word."""


class _Follower:
    def __init__(self, adapter: ModelAdapter, led: Led) -> None:
        self._adapter, self._led = adapter, led
        self._prefixes = Prefixes(0)
        self._decoder: LedDecoder
        self._decoding = contextlib.ExitStack()
        self._ready = False  # whether the model is in the state in which it decodes

    def close(self) -> None:
        """Leaves the model as it was before it decoded."""
        self._decoding.close()
        self._ready = False

    def until(self, *ends: str) -> str:
        """Does what is said, until one of these words."""
        while True:
            what, args = self._led.hear()
            if what in ends:
                return what
            do: Callable[..., None] | None = getattr(self, f"_do_{what}", None)
            if do is None:
                raise Parted(
                    f"the first process goes on with {what!r}, for which nothing is ready here; the server ends."
                )
            try:
                do(*args)
            except _FirstFailed:
                self._led.meet()
            except Exception as error:
                self._failed(what, error)

    def _failed(self, what: str, error: Exception) -> None:
        """Goes on where the first process has failed as well."""
        _logger.debug("%s has failed", what, exc_info=error)
        try:
            self._hear("failed", _FAILING)
        except Parted as parted:
            raise Parted(
                f"{what!r} has failed in this process, and the first one is gone or has not failed in it; the server "
                f"ends. ({type(error).__name__}: {error})"
            ) from parted
        self._led.meet()

    def _hear(self, wanted: str, timeout: timedelta | None = None) -> tuple[Any, ...]:
        """What is said next, which has to be this, or that what was said last has failed."""
        what, args = self._led.hear(timeout)
        if what == "failed" != wanted:
            raise _FirstFailed
        if what != wanted:
            raise Parted(
                f"the first process goes on with {what!r} where {wanted!r} was to come; the server ends."
            )
        return args

    def _check(self, theirs: tuple[int, ...], *ours: int) -> None:
        here = *ours, *facts(self._decoder)
        if here != theirs:
            raise Parted(
                f"this process has other rows than the first, {here} and not {theirs}; the server ends."
            )

    # What is said

    def _do_failed(self) -> None:
        self._led.meet()

    def _do_begin(self, padding: int, form: CallForm, prefill_tokens: int, prefix_bytes: int) -> None:
        if prefix_bytes != self._prefixes.most_bytes:
            self._prefixes = Prefixes(prefix_bytes)
        self._prefixes.clear()
        self._decoder = LedDecoder(
            self._hear,
            self._adapter,
            padding,
            form=form,
            prefill_tokens=prefill_tokens,
            prefixes=self._prefixes,
        )

    def _do_read(self, number: int, states: list[Any], places: list[int], theirs: tuple[int, ...]) -> None:
        self._prepare()
        reading = self._decoder.read_again(states, places)
        self._led.kept[number] = reading
        self._check(theirs, reading.done, reading.columns)

    def _do_advance(self, number: int, *theirs: int) -> None:
        self._prepare()
        reading: Reading = self._led.kept[number]
        self._check(theirs, reading.done)
        self._decoder.advance(reading)

    def _do_join(self, number: int, sound: bool) -> None:
        reading: Reading = self._led.kept[number]
        reading.sound = sound
        self._decoder.join(reading)

    def _do_step(self, *theirs: int) -> None:
        self._prepare()
        self._check(theirs)
        self._decoder.step()

    def _do_drop(self, rows: list[LedRow]) -> None:
        self._decoder.drop(rows)

    def _do_detach(self) -> None:
        self._decoder.detach()
        self.close()

    def _do_work(self, work: Callable[[ModelAdapter], Any], pauses: bool, pass_tokens: int | None) -> None:
        with pausing(self._pause, pass_tokens) if pauses else contextlib.nullcontext():
            try:
                work(self._adapter)
            except Exception as error:  # the first process tells whoever waits
                _logger.debug("work has failed", exc_info=error)
        self._hear("worked", _ENDING)
        self._led.meet()

    def _pause(self) -> None:
        """Follows what the first process does in a pause of work."""
        if self.until("resume", "stop") == "stop":
            raise APIError("Nobody waits for this work any more.", 503)

    def _prepare(self) -> None:
        if not self._ready:
            self._decoding.enter_context(undisturbed(self._adapter.hf_model))
            self._decoding.enter_context(torch.no_grad())
            self._ready = True


@contextlib.contextmanager
def _deaf() -> Iterator[None]:
    """Runs a block that neither Ctrl-C nor SIGTERM ends."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {one: signal.signal(one, signal.SIG_IGN) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for one, how in before.items():
            signal.signal(one, how)
