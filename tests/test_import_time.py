"""Start-up: the package and the command are there at once, and heavy libraries wait until they are used."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

HEAVY = ("torch", "transformers", "numpy", "matplotlib", "fastapi", "transformer_lens", "requests", "rich")


def best_of(command: list[str], runs: int = 7) -> float:
    """Least seconds of several runs: the machine may be busy, never faster than it is."""
    times = []
    for _ in range(runs):
        started = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        times.append(time.perf_counter() - started)
    return min(times)


def test_importing_the_package_takes_less_than_a_tenth_of_a_second() -> None:
    code = "import time; t = time.perf_counter(); import mechanex; print(time.perf_counter() - t)"
    runs = [
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
        for _ in range(7)
    ]
    assert min(map(float, runs)) < 0.1


@pytest.mark.parametrize("command", [["--help"], ["--version"], ["steer", "--help"], ["demo", "--help"]])
def test_help_takes_less_than_three_tenths_of_a_second(command: list[str]) -> None:
    assert best_of([sys.executable, "-m", "mechanex.cli", *command]) < 0.3


@pytest.mark.parametrize(
    "code",
    [
        "import mechanex",
        "import mechanex.steering, mechanex.generation, mechanex.errors, mechanex.client",
        "import mechanex; mechanex.Mechanex(); mechanex.load; mechanex.steering.get_vectors; dir(mechanex)",
        "import mechanex.cli",
    ],
)
def test_heavy_libraries_wait_until_they_are_used(code: str) -> None:
    check = f"{code}; import sys; print([m for m in {HEAVY!r} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", check], check=True, capture_output=True, text=True).stdout
    assert out.strip() == "[]"
