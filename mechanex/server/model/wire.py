"""Between the processes of a split model: the first tells what it does with the model, and the others do the same.

What is told waits until the model is to be run or left, and then goes in one message. Large things that many requests
share, such as edits, are sent once, by a number that stands for them as long as the first process has them: they are
shared by the others' rows too, then.
"""

from __future__ import annotations

import atexit
import io
import itertools
import logging
import os
import pickle
import struct
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..._private.torch import default_store
from ...engine.decode.row import Row
from ...engine.intervention import Edit
from ...engine.models.adapter import ModelAdapter
from ...engine.prompt_conditions import PromptCondition
from ...engine.sae.autoencoder import SparseAutoencoder
from ...engine.sae.behavior import Behavior
from ...engine.schedules import Varying
from ...errors import MechanexError
from .led import LedRow, Parted

__all__ = ["Lead", "Led", "Parted"]

T = TypeVar("T")

PATIENCE = timedelta(minutes=30)  # that a process waits for another one's next word
MEETING = timedelta(seconds=30)  # that the first waits for the others where all have to have failed or ended
_LOOK = 1.0  # seconds from one look to the next whether the first process has left
_TIME_TO_END = 5.0  # seconds that a process then has to end by itself
_LEFT = "mechanex/first has left"  # in the job's store
_STORE_GONE = RuntimeError  # what torch raises where whoever keeps the store is gone, or a subclass of it
_HEAD = 2048  # bytes that every message has; most have no more

_SHARED = (Row, Edit, Varying, PromptCondition, Behavior, SparseAutoencoder)
_Own = Mapping[str, object]


class _Wire:
    """One process's end.

    Args:
        own: what every process has one of its own of, by a name that is told in its place.
    """

    def __init__(self, own: _Own) -> None:
        self._own = own
        self._group = dist.new_group(backend="gloo", timeout=PATIENCE)

    def meet(self) -> None:
        """Waits until every process is here.

        Raises:
            Parted: one doesn't come.
        """
        with self._reaching():
            dist.monitored_barrier(self._group, timeout=MEETING)

    def _pass(self, buffer: bytearray, timeout: timedelta | None) -> None:
        """Hands bytes from the first process to the others."""
        with self._reaching():
            sent = dist.broadcast(torch.frombuffer(buffer, dtype=torch.uint8), 0, self._group, async_op=True)
            assert sent is not None
            sent.wait(PATIENCE if timeout is None else timeout)

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # what torch raises has no narrower type
            atexit.unregister(_leave)
            atexit.register(_leave, 1)
            raise Parted(
                "another process of the split model can't be reached: it was ended, is stuck, or its machine is gone; "
                f"the server ends. ({str(error).splitlines()[0][:200]})"
            ) from error


class Lead(_Wire):
    """The first process's end; for the model's thread, or whoever has the model before that.

    Args:
        own: what every process has one of its own of, by a name that is told in its place.
    """

    def __init__(self, own: _Own) -> None:
        super().__init__(own)
        self._numbers: weakref.WeakKeyDictionary[object, int] = weakref.WeakKeyDictionary()
        self._count = itertools.count()
        self._gone: deque[int] = deque()
        self._told: list[bytes] = []
        self._ended = False
        self.parted: Parted | None = None
        """Why nothing can be told any more, if so."""

    def number(self, thing: object) -> int:
        """What stands for a thing as long as it is there."""
        found = self._numbers.get(thing)
        if found is None:
            found = self._numbers[thing] = next(self._count)
            weakref.finalize(thing, self._gone.append, found).atexit = False
        return found

    def tell(self, what: str, *args: object) -> None:
        """Says what the others are to do, as things are now; they hear of it with the next ``flush``.

        Args:
            what: the name that the others have for it.
            args: what can be pickled; what is in ``_SHARED`` arrives as the same object each time.
        """
        self._told.append(self._written((what, *args)))

    def flush(self, timeout: timedelta | None = None) -> None:
        """Sends what was told.

        Args:
            timeout: that the others may take to listen.

        Raises:
            Parted: they don't, or one is gone.
        """
        if self._told or self._gone:
            self._send(timeout)

    def beat(self) -> None:
        """Says that there is nothing to do yet, or what was told."""
        self._send(None)

    def failed(self) -> None:
        """Says that what was told last has failed; it must have in the others too, or they have to be told the end."""
        self.tell("failed")
        self.flush(MEETING)
        self.meet()

    def work(
        self,
        work: Callable[[ModelAdapter], T],
        adapter: ModelAdapter,
        *,
        pauses: bool = False,
        pass_tokens: int | None = None,
    ) -> T:
        """Has all processes do a piece of work, and gives what it came to in this one.

        Args:
            work: is called with each process's adapter; a function of a module, or a ``partial`` of one.
            adapter: this one's.
            pauses: whether it is done inside ``pausing`` (:mod:`mechanex.engine.pauses`), so that the others pause too,
                until they are told to ``resume`` or ``stop``.
            pass_tokens: as is said there.

        Raises:
            MechanexError: it can't be sent to the others (501).
        """
        try:
            self.tell("work", work, pauses, pass_tokens)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise MechanexError(
                "this can't be done by a server whose model is split over processes (--tp): ask one whose model is "
                "whole.",
                501,
            ) from error
        self.flush()
        try:
            return work(adapter)
        finally:
            self._worked()

    def check(self) -> None:
        """Raises the :class:`Parted` for which nothing can be told any more, if so."""
        if self.parted is not None:
            raise self.parted

    def end(self) -> None:
        """Lets the others end; twice does nothing.

        Raises:
            MechanexError: the processes have parted.
        """
        if self.parted is None and not self._ended:
            self._ended = True
            with suppress(Parted):
                self.tell("end")
                self.flush(MEETING)
        if self.parted is not None:
            raise MechanexError(str(self.parted)) from self.parted

    def leave(self) -> None:
        """Tells the others that this process ends while its model is at work: they wait for it no longer."""
        default_store().set(_LEFT, b"1")

    def _worked(self) -> None:
        if self.parted is None:
            self.tell("worked")
            self.flush(MEETING)
            self.meet()

    def _send(self, timeout: timedelta | None) -> None:
        if self._gone:
            self.tell("forget", [self._gone.popleft() for _ in range(len(self._gone))])
        payload = pickle.dumps(self._told)
        self._told = []
        head = bytearray(struct.pack("<q", len(payload)) + payload[: _HEAD - 8]).ljust(_HEAD, b"\0")
        self._pass(head, timeout)
        if len(payload) > _HEAD - 8:
            self._pass(bytearray(payload[_HEAD - 8 :]), timeout)

    def _written(self, given: object) -> bytes:
        writer = _Writer(self._own, self._numbers, self.number)
        try:
            return writer.written(given)
        except BaseException:
            for thing in writer.new:  # nobody will hear what they are
                self._numbers.pop(thing, None)
            raise

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        self.check()
        try:
            with super()._reaching():
                yield
        except Parted as error:
            self.parted = error
            raise


class Led(_Wire):
    """Another process's end.

    Args:
        own: what every process has one of its own of, by a name that is told in its place.

    Attributes:
        kept: what the first process has, by its numbers.
    """

    def __init__(self, own: _Own) -> None:
        super().__init__(own)
        self.kept: dict[int, Any] = {}
        self._heard: deque[bytes] = deque()

    def hear(self, timeout: timedelta | None = None) -> tuple[str, tuple[Any, ...]]:
        """What the first process says next, and about what; waits for it.

        Raises:
            Parted: it is gone.
        """
        while True:
            while not self._heard:
                self._receive(timeout)
            what, *args = _Unpickler(self._heard.popleft(), self._own, self.kept).load()
            if what != "forget":
                return what, tuple(args)
            for number in args[0]:
                self.kept.pop(number, None)

    @property
    def first_has_left(self) -> bool:
        """Whether the first process is known to have ended while its model was at work."""
        try:
            return _first_has_left()
        except _STORE_GONE:
            return False

    def leave(self) -> None:
        """Ends this process in order, as the first one has ended, though that can't be reached any more."""
        _leave(0)

    @contextmanager
    def ending_with_first(self) -> Iterator[None]:
        """Runs a block; where the first process leaves in its midst, so does this one, whatever it is at."""
        over = threading.Event()
        threading.Thread(target=self._watch, args=(over,), name="mechanex-first", daemon=True).start()
        try:
            yield
        finally:
            over.set()

    def _watch(self, over: threading.Event) -> None:
        while not over.wait(_LOOK):
            code = 0
            try:
                if not _first_has_left():
                    continue
            except _STORE_GONE:
                code = 1
            if not over.wait(_TIME_TO_END):
                _leave(code)

    def _receive(self, timeout: timedelta | None) -> None:
        head = bytearray(_HEAD)
        self._pass(head, timeout)
        (size,) = struct.unpack_from("<q", head)
        payload = head[8 : 8 + size]
        if size > _HEAD - 8:
            rest = bytearray(size - (_HEAD - 8))
            self._pass(rest, timeout)
            payload += rest
        self._heard += pickle.loads(payload)


def _first_has_left() -> bool:
    return bool(default_store().check([_LEFT]))


def _leave(code: int) -> None:
    """Ends the process: the interpreter's own end would wait for what is still under way between processes."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class _Writer:
    """Writes what is told.

    Args:
        own: as the wire has it.
        numbers: of the shared things that were told.
        number: gives another one its number.
    """

    def __init__(
        self,
        own: _Own,
        numbers: weakref.WeakKeyDictionary[object, int],
        number: Callable[[object], int],
    ) -> None:
        self._names = {id(one): name for name, one in own.items() if one is not None}
        self._numbers, self._number = numbers, number
        self.new: list[object] = []
        """Shared things that were not told before."""

    def written(self, given: object) -> bytes:
        """An object as bytes."""
        file = io.BytesIO()
        _Pickler(file, self, given).dump(given)
        return file.getvalue()

    def standing_for(self, thing: object) -> str | int | tuple[int, bytes] | None:
        """What is written in a thing's place: a name, a number, a number with what it stands for from now on."""
        name = self._names.get(id(thing))
        if name is not None or not isinstance(thing, _SHARED):
            return name
        if thing in self._numbers:
            return self._numbers[thing]
        self.new.append(thing)
        number = self._number(thing)
        return number, self.written(LedRow.of(thing) if isinstance(thing, Row) else thing)


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, writer: _Writer, whole: object) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self._writer, self._whole = writer, whole

    def persistent_id(self, thing: object) -> Any:
        return None if thing is self._whole else self._writer.standing_for(thing)

    def reducer_override(self, thing: Any) -> Any:
        if type(thing) is not Tensor:
            return NotImplemented
        # Not the whole storage of which it may be a part, and on no device that the others lack.
        alone: Any = thing.detach().cpu().clone()
        return alone.__reduce_ex__(pickle.HIGHEST_PROTOCOL)


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, own: _Own, kept: dict[int, Any]) -> None:
        super().__init__(io.BytesIO(data))
        self._own, self._kept = own, kept

    def persistent_load(self, standing: str | int | tuple[int, bytes]) -> Any:
        if isinstance(standing, str):
            return self._own[standing]
        if isinstance(standing, tuple):
            number, data = standing
            self._kept[number] = _Unpickler(data, self._own, self._kept).load()
            return self._kept[number]
        return self._kept[standing]
