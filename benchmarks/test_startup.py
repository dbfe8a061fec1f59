"""Start-up: the package and the command are there at once, in seconds of a new interpreter."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

IMPORT = "import time; t = time.perf_counter(); import mechanex; print(time.perf_counter() - t)"


def test_import() -> None:
    """The least of several runs: the machine may be busy, never faster than it is."""
    runs = [
        subprocess.run([sys.executable, "-c", IMPORT], check=True, capture_output=True).stdout
        for _ in range(7)
    ]
    assert min(map(float, runs)) < 0.1


@pytest.mark.parametrize("command", [["--help"], ["--version"], ["steer", "--help"], ["demo", "--help"]])
def test_help(command: list[str]) -> None:
    times = []
    for _ in range(7):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "mechanex.cli", *command], check=True, capture_output=True)
        times.append(time.perf_counter() - started)
    assert min(times) < 0.3
