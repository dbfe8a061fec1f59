"""Processes forked from one that has imported torch, transformers and the server: each begins at once, not in seconds.

A process has its own environment, streams, signals and exit code, as one that a shell starts.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

__all__ = ["Forked", "fork"]

_IMPORTED = [
    "mechanex.cli",
    "mechanex.client",
    "mechanex.commands.serve",
    "mechanex.engine.few_shot",
    "mechanex.engine.generate",
    "mechanex.server.serve",
    "transformers.models.llama.modeling_llama",
    "transformers.models.llama.tokenization_llama",
]


class Forked:
    """One of them, with the methods of ``subprocess.Popen`` that tests use."""

    def __init__(self, process: Any) -> None:
        self._process = process
        self.pid: int = process.pid

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def poll(self) -> int | None:
        """The exit code, negative for a signal's; None while it runs."""
        return self._process.exitcode  # type: ignore[no-any-return]

    def send_signal(self, how: int) -> None:
        """Sends a signal to it, where it still runs."""
        if self.poll() is None:
            os.kill(self.pid, how)

    def kill(self) -> None:
        """Ends it at once."""
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        """Waits for its end and gives the exit code; raises ``subprocess.TimeoutExpired`` after so many seconds."""
        self._process.join(timeout)
        code = self.poll()
        if code is None:
            raise subprocess.TimeoutExpired("forked", timeout or 0)
        return code


def fork(
    arguments: Sequence[str],
    variables: Mapping[str, str],
    log: Path,
    *,
    program: str | None = None,
    folder: Path | None = None,
) -> Forked:
    """Starts ``mechanex ARGUMENTS``, or a program of Python that has them, in a folder; its output goes to a file."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED)
    process = context.Process(
        target=_run,
        args=(list(arguments), dict(variables), str(log), program, str(folder or Path.cwd())),
        daemon=True,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # read once, when torch is imported
        process.start()
    return Forked(process)


def _run(arguments: list[str], variables: dict[str, str], log: str, program: str | None, folder: str) -> None:
    import torch

    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    torch.set_num_threads(1)
    if program is not None:
        sys.argv = ["-c", *arguments]
        exec(program, {"__name__": "__main__"})
        return
    from mechanex.cli import main

    main(arguments, prog_name="mechanex")
