"""How long a connection may take to say what it wants: uvicorn waits for ever for the end of a request's head."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from ..._private.uvicorn import H11Protocol

__all__ = ["HeadDeadline"]

HEAD_SECONDS = 10.0
"""In which a whole request head must come, from the connection's begin or from the head's first byte."""


class HeadDeadline(H11Protocol):
    """Uvicorn's protocol, closing connections that don't send a whole request head in ``HEAD_SECONDS``."""

    waits_since: float | None = None
    """When it began to owe a head; None while a request is answered."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._owe_head()

    def data_received(self, data: bytes) -> None:
        before = self.cycle
        super().data_received(data)
        if self.cycle is not before:
            self._settle()
            self.waits_since = None
        elif self._timer is None and (self.cycle is None or self.cycle.response_complete):
            self._owe_head()  # uvicorn's own timer of kept connections ends with the first byte

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.cycle.response_complete:  # no other request was waiting
            self.waits_since = time.monotonic()

    def connection_lost(self, exc: Exception | None) -> None:
        self._settle()
        super().connection_lost(exc)

    def _owe_head(self) -> None:
        self.waits_since = time.monotonic()
        self._timer = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _settle(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
