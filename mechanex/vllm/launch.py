"""``serve(use_vllm=True)``: vLLM's OpenAI server in a process of its own, with steering."""

from __future__ import annotations

import atexit
import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import click

from ..engine.models.sources import find_source
from ..engine.sae.store import BEHAVIOR_FILE, read_behavior
from ..errors import MechanexError, ValidationError
from ..server.settings import ServerSettings
from .capacity import Capacity
from .options import steering_options
from .served import BEHAVIORS_VARIABLE, VECTORS_VARIABLE
from .supported import check_installed

__all__ = ["RunningEngine", "serve_vllm", "server_arguments"]

_OURS = ("host", "port", "key", "vectors", "behaviors", "model_name", "max_batch")
_END_SECONDS = 20.0


def serve_vllm(
    model: str | os.PathLike[str],
    settings: Mapping[str, Any],
    *,
    dtype: str | None = None,
    capacity: Capacity | None = None,
    vllm_args: Sequence[str] = (),
    block: bool = True,
) -> RunningEngine | None:
    """Serves a model in vLLM until SIGINT or SIGTERM, or beside this process.

    Args:
        model: a bundled name, a folder or a name of the Hub.
        settings: of :class:`mechanex.server.settings.ServerSettings`: host, port, key, vectors, behaviors (files of
            behaviors), model_name, max_batch.
        dtype: of the model; None for its own.
        capacity: of the tables of edits.
        vllm_args: further arguments of ``vllm serve``.
        block: False returns when the server answers.

    Raises:
        ValidationError: vLLM is missing, or a setting that it doesn't have.
        MechanexError: the server did not start; what it wrote says why.
    """
    check_installed()
    source = find_source(model)
    other = sorted(
        name for name, value in settings.items() if name not in _OURS and value not in (None, (), [])
    )
    if other:
        raise ValidationError(
            f"a server on vLLM has no {', '.join(other)}: it has {', '.join(_OURS)}, and vllm_args for vLLM's own. "
            "Leave it out, or serve without use_vllm."
        )
    given = ServerSettings(**{name: settings[name] for name in _OURS if settings.get(name) is not None})
    key, made = given.server_key(), False
    if key is None and not given.is_loopback:
        key, made = f"mx-{secrets.token_urlsafe(32)}", True
    for path in given.behaviors:
        if path.suffix != BEHAVIOR_FILE or not path.is_file():
            raise ValidationError(
                f"in vLLM, --behaviors names {BEHAVIOR_FILE} files of behaviors, as create_behavior keeps them, and "
                f"{path} is none."
            )
        if os.pathsep in str(path.absolute()):
            raise ValidationError(f"the path of a file of behaviors has no {os.pathsep!r}; got {path}.")
        read_behavior(path)
    capacity = capacity or Capacity()
    if given.behaviors:
        capacity = replace(capacity, behaviors=True)
    port = given.port or _free_port(given.host)
    arguments = server_arguments(
        source.location,
        host=given.host,
        port=port,
        name=given.model_name or source.name,
        capacity=capacity,
        further=[
            *(["--max-num-seqs", str(given.max_batch)] if settings.get("max_batch") else []),
            *(["--dtype", dtype] if dtype else []),
            *vllm_args,
        ],
    )
    environment = dict(os.environ)
    environment.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
    environment.pop("VLLM_API_KEY", None)
    if key is not None:
        environment["VLLM_API_KEY"] = key  # not an argument, which others on this machine may read
    if given.vectors is not None:
        environment[VECTORS_VARIABLE] = str(Path(given.vectors).absolute())
    if given.behaviors:
        environment[BEHAVIORS_VARIABLE] = os.pathsep.join(str(path.absolute()) for path in given.behaviors)
    shown = f"[{given.host}]" if ":" in given.host else given.host
    near = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(shown, shown)
    command = [sys.executable, "-m", "mechanex.vllm.entry", *arguments]
    begun = f"Serving {given.model_name or source.name} with vLLM at http://{shown}:{port} (OpenAI: /v1)"

    def start() -> RunningEngine:
        running = RunningEngine(command, environment, f"http://{near}:{port}", key)
        click.echo(begun)
        if made:
            click.echo(f"Key for every client, shown this once (or set MECHANEX_SERVER_KEY): {key}")
        return running

    if not block:
        return start()
    with _until_interrupted(), start() as running:
        running.wait()
    return None


@contextlib.contextmanager
def _until_interrupted() -> Iterator[None]:
    """Runs a block, which SIGTERM and SIGINT end; other threads than the main one get no signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGTERM, before)


def server_arguments(
    model: str,
    *,
    host: str,
    port: int,
    name: str,
    capacity: Capacity,
    further: Sequence[str] = (),
) -> list[str]:
    """The arguments of ``vllm serve`` with which it steers."""
    return [
        f"--model={model}",
        f"--served-model-name={name}",
        f"--host={host}",
        f"--port={port}",
        *steering_options(capacity),
        *further,
    ]


class RunningEngine:
    """A server on vLLM that runs until ``stop``, or until the program ends. A context manager, too.

    Attributes:
        url: where it answers on this machine; OpenAI's API is under ``/v1``.
        key: the key that every client sends, or None where none is asked for.

    Raises:
        MechanexError: it did not start.
    """

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], url: str, key: str | None
    ) -> None:
        self.url, self.key = url, key
        self._process = subprocess.Popen(command, env=dict(environment))
        atexit.register(self.stop)
        try:
            self._await_answer()
        except BaseException:
            self.stop()
            raise

    @property
    def running(self) -> bool:
        """Whether it still serves."""
        return self._process.poll() is None

    def wait(self) -> None:
        """Returns when the server has ended.

        Raises:
            MechanexError: it failed.
        """
        code = self._process.wait()
        if code not in (0, -signal.SIGTERM, -signal.SIGINT, 128 + signal.SIGTERM, 128 + signal.SIGINT):
            raise MechanexError(f"vLLM's server ended with code {code}; what it wrote says why.")

    def stop(self) -> None:
        """Ends the server; twice does nothing."""
        atexit.unregister(self.stop)
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def _await_answer(self) -> None:
        while True:
            code = self._process.poll()
            if code is not None:
                raise MechanexError(
                    f"vLLM's server did not start (code {code}); what it wrote above says why."
                )
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return
            except OSError:
                pass
            time.sleep(0.2)

    def __enter__(self) -> RunningEngine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def __repr__(self) -> str:
        return f"<vLLM's server at {self.url}, {'running' if self.running else 'stopped'}>"


def _free_port(host: str) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.bind((host.strip("[]"), 0))
        return int(probe.getsockname()[1])
