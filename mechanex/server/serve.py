"""Running the application: the port, the key, the logs, and an end that lets answers finish."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import dataclasses
import gc
import json
import logging
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click
import uvicorn

from .._private.uvicorn import forget_signals
from ..errors import MechanexError
from .app import create_app
from .http.connections import BACKLOG, bounded, listen, most_connections
from .settings import ServerSettings

if TYPE_CHECKING:
    from ..engine.models.resolve import LoadedModel
    from ..engine.vector_store import VectorStore
    from .model.scheduler import Scheduler
    from .model.wire import Lead

__all__ = ["RunningServer", "serve_loaded"]

_logger = logging.getLogger(__name__)
_END_SECONDS = 10.0  # beyond the time that running answers have
_SWITCH_SECONDS = (
    0.0005  # between the model's thread and the event loop, so that neither waits long for the other
)


def serve_loaded(
    settings: ServerSettings,
    loaded: LoadedModel,
    vectors: VectorStore | None = None,
    *,
    block: bool = True,
    lead: Lead | None = None,
) -> RunningServer | None:
    """Serves a model until SIGINT or SIGTERM, or in a thread of its own.

    A server that other machines reach and that was given no key makes one and prints it, once.

    Args:
        settings: how to serve.
        loaded: the model.
        vectors: the operator's stored vectors.
        block: False serves from a thread, and returns when the server answers.
        lead: where other processes hear what is done, where the model is split over several, which end with this one;
            only with ``block=True``.

    Returns:
        The running server, or None when the call blocked and it has ended.

    Raises:
        ValidationError: settings that don't fit the model.
        MechanexError: the address is taken or isn't this machine's, a file can't be used; of a split model another
            process is gone, or the thread that runs it has failed.
    """
    if not block:
        return RunningServer(Listening(settings, loaded, vectors))
    is_stuck = False
    try:
        listening = Listening(settings, loaded, vectors, lead)
        with _lively():
            listening.run()
        is_stuck = listening.scheduler.alive
    finally:
        if lead is not None and is_stuck:
            lead.leave()
        elif lead is not None:
            lead.end()
    if is_stuck:
        atexit.register(_leave, listening.scheduler)
    elif lead is not None and listening.scheduler.has_failed:
        raise MechanexError(
            "the model's thread has failed, as the log says: all processes of the server end."
        )
    return None


class Listening:
    """A server that has its address and its application, and is ready to run.

    Attributes:
        server: uvicorn's server.
        scheduler: whose thread runs the model.
        key: the key that every client sends, or None.
        local_url: where it is reached from this machine.
        grace: seconds that running answers have when it ends.
    """

    def __init__(
        self,
        settings: ServerSettings,
        loaded: LoadedModel,
        vectors: VectorStore | None,
        lead: Lead | None = None,
    ) -> None:
        made: str | None = None
        if settings.server_key() is None and not settings.is_loopback:
            made = f"mx-{secrets.token_urlsafe(32)}"
            settings = dataclasses.replace(settings, key=made)
        self.key, self.grace = settings.server_key(), settings.shutdown_grace
        self._socket = listen(settings)
        try:
            app = create_app(settings, loaded, vectors=vectors, lead=lead)
        except BaseException:
            self._socket.close()
            raise
        self.scheduler: Scheduler = app.state.engine.scheduler
        host, port = self._socket.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        near = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(shown, shown)
        self.local_url = f"http://{near}:{port}"
        click.echo(
            f"Serving {app.state.engine.model_name} at http://{shown}:{port} (OpenAI: http://{shown}:{port}/v1)"
        )
        if made is not None:
            click.echo(f"Key for every client, shown this once (or set MECHANEX_SERVER_KEY): {made}")
        config = uvicorn.Config(
            app,
            http=bounded(most_connections()),
            backlog=BACKLOG,
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=3,
            timeout_keep_alive=30,
            server_header=False,
            proxy_headers=bool(settings.trusted_proxies),
            forwarded_allow_ips=list(settings.trusted_proxies),
            lifespan="on",
        )
        self.server = _Server(config, settings.shutdown_grace, lasts=lead is None)

    def run(self) -> None:
        """Serves, until a signal or ``server.should_exit``."""
        log = logging.getLogger("uvicorn.error")
        log.addFilter(_is_no_cancellation)
        try:
            self.server.run(sockets=[self._socket])
        finally:
            log.removeFilter(_is_no_cancellation)
            self._socket.close()


@contextlib.contextmanager
def _lively() -> Iterator[None]:
    """Lets the threads of this process, which does nothing but serve, take turns quickly."""
    # Prompts are encoded one by one, for which the tokenizer's threads are only woken and waited for.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    interval = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH_SECONDS)
    # What is loaded now stays; looking through it again and again would only hold up answers.
    gc.freeze()
    try:
        yield
    finally:
        sys.setswitchinterval(interval)
        gc.unfreeze()  # else extensions find their objects still alive at the interpreter's end, and say so


def _is_no_cancellation(record: logging.LogRecord) -> bool:
    """False for a request that was cancelled, which uvicorn takes for a failure; it has said that it cancels them."""
    kind = record.exc_info[0] if record.exc_info else None
    return kind is None or not issubclass(kind, asyncio.CancelledError)


def _leave(scheduler: Scheduler) -> None:
    """Ends the process while the model's thread is in work that can't be stopped: the interpreter's own end, which
    takes the thread down in the middle of C++ code, would abort."""
    if scheduler.alive:
        _logger.warning("the model is still at work for a request; the process ends without it")
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


class _Server(uvicorn.Server):
    """Uvicorn's server, which lets running answers finish before it closes connections.

    Args:
        config: uvicorn's settings.
        grace: seconds that running answers have when it ends.
        lasts: whether it goes on when its model's thread has failed, to say so; one of several processes doesn't.
    """

    def __init__(self, config: uvicorn.Config, grace: float, *, lasts: bool) -> None:
        super().__init__(config)
        self._grace, self._lasts = grace, lasts
        self.settled = threading.Event()
        """Set when it answers, or never will."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.settled.set()

    async def on_tick(self, counter: int) -> bool:
        if not self._lasts and self.config.app.state.engine.scheduler.has_failed:  # type: ignore[union-attr]
            self.should_exit = True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        scheduler = self.config.app.state.engine.scheduler  # type: ignore[union-attr]
        _logger.info("shutting down: %d answers run", scheduler.n_running)
        await scheduler.drain(self._grace)
        await asyncio.sleep(0.05)  # the last events go out
        await super().shutdown(sockets)
        forget_signals(self)


class JsonLines(logging.Formatter):
    """One JSON object a line; a message that is one already gives its fields."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        message = record.getMessage()
        if record.name == "mechanex.server.access":
            line |= json.loads(message)
        else:
            line["message"] = message
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


class RunningServer:
    """A server that runs in a thread until ``stop``, or until the program ends. A context manager, too.

    Attributes:
        url: where it answers on this machine; OpenAI's API is under ``/v1``.
        key: the key that every client sends, or None where none is asked for.

    Raises:
        MechanexError: it did not start.
    """

    def __init__(self, listening: Listening) -> None:
        self.url, self.key = listening.local_url, listening.key
        self._listening = listening
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="mechanex-server", daemon=True)
        self._thread.start()
        listening.server.settled.wait()
        if not listening.server.started:
            self._thread.join(_END_SECONDS)
            raise MechanexError("the server did not start; its log says why.") from self._error
        atexit.register(self.stop)

    @property
    def running(self) -> bool:
        """Whether it still serves."""
        return self._thread.is_alive()

    def stop(self) -> None:
        """Takes no more requests, gives running answers the time of ``shutdown_grace``, and ends; twice does nothing.

        Raises:
            MechanexError: it has not ended in that time, since the model is at work that can't be stopped.
        """
        atexit.unregister(self.stop)
        self._listening.server.should_exit = True
        self._thread.join(self._listening.grace + _END_SECONDS)
        end = time.monotonic() + _END_SECONDS
        while self._listening.scheduler.alive and time.monotonic() < end:
            time.sleep(0.01)
        if self._thread.is_alive() or self._listening.scheduler.alive:
            raise MechanexError("the server has not ended yet: the model is at work that can't be stopped.")

    def _run(self) -> None:
        try:
            self._listening.run()
        except BaseException as error:
            self._error = error
        finally:
            self._listening.server.settled.set()

    def __enter__(self) -> RunningServer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def __repr__(self) -> str:
        return f"<mechanex server at {self.url}, {'running' if self.running else 'stopped'}>"
