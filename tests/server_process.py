"""A real ``mechanex serve`` in a process of its own, for tests that talk to it over HTTP.

Use::

    @pytest.fixture(scope="module")
    def server(tmp_path_factory):
        with serving(home=tmp_path_factory.mktemp("home")) as running:
            yield running
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from forked import Forked, fork

__all__ = ["ServerProcess", "free_port", "serving"]


@dataclass
class ServerProcess:
    """A running server; ``url`` has no slash at its end, ``log`` is the file with its output."""

    process: subprocess.Popen[bytes] | Forked
    port: int
    home: Path
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def output(self) -> str:
        """Everything that the server has printed."""
        return self.log.read_text(errors="replace")

    def get(self, path: str) -> str:
        """The body of a plain GET."""
        with urllib.request.urlopen(self.url + path, timeout=120) as answer:
            return str(answer.read().decode())

    def metric(self, name: str) -> float:
        """A value of /metrics, by its name with labels as printed there; 0 where it isn't there yet."""
        for line in self.get("/metrics").splitlines():
            if line.rpartition(" ")[0] == name:
                return float(line.rpartition(" ")[2])
        return 0.0

    def stop(self, how: signal.Signals = signal.SIGTERM, timeout: float = 120) -> int:
        """Ends the server and gives its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(how)
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"the server did not end within {timeout} s:\n{self.output()}") from None


def free_port() -> int:
    """A TCP port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def serving(
    *arguments: str,
    home: Path,
    model: str = "mx-tiny",
    host: str = "127.0.0.1",
    environment: Mapping[str, str] | None = None,
    program: str | None = None,
    fresh: bool = False,
    start: Sequence[str] | None = None,
    timeout: float = 300,
) -> Iterator[ServerProcess]:
    """Starts ``mechanex serve MODEL --host --port ARGUMENTS``, waits until it is ready, kills it at the end.

    Args:
        arguments: further arguments of the command.
        home: its ``MECHANEX_HOME``.
        environment: further environment variables.
        program: Python that serves, in place of ``mechanex serve``; its arguments are ``--port PORT``.
        fresh: whether it is started as a shell starts it, not forked from a process that has imported what it needs.
        start: what starts it, in place of ``mechanex``: a command that ends what it has started when SIGTERM ends it.
    """
    port, log = free_port(), home / f"server-{time.monotonic_ns()}.log"
    given = [] if program else ["serve", model, "--host", host]
    given += ["--port", str(port), *arguments]
    variables = {
        **os.environ,
        "MECHANEX_HOME": str(home),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",
        "PYTHONUNBUFFERED": "1",
        **(environment or {}),
    }
    home.mkdir(parents=True, exist_ok=True)
    process: subprocess.Popen[bytes] | Forked
    if fresh or start:
        command = start or [sys.executable, *(["-c", program] if program else ["-m", "mechanex.cli"])]
        with log.open("wb") as out:
            process = subprocess.Popen(
                [*command, *given], stdout=out, stderr=subprocess.STDOUT, env=variables
            )
    else:
        log.touch()
        process = fork(given, variables, log, program=program)
    server = ServerProcess(process, port, home, log)
    try:
        _wait_until_ready(server, timeout)
        yield server
    finally:
        if start and process.poll() is None:
            server.stop()
        if process.poll() is None:
            process.kill()
        process.wait()


def _wait_until_ready(server: ServerProcess, timeout: float) -> None:
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        if server.process.poll() is not None:
            raise AssertionError(f"the server ended with {server.process.returncode}:\n{server.output()}")
        try:
            server.get("/ready")
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise AssertionError(f"the server was not ready within {timeout} s:\n{server.output()}")
