"""Start-up: heavy libraries wait until they are used. How long it takes is in ``benchmarks/test_startup.py``."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "numpy", "matplotlib", "fastapi", "transformer_lens", "requests", "rich")


def heavy_after(code: str) -> str:
    """Which heavy libraries an interpreter has loaded after this code, which may end in SystemExit."""
    check = (
        "import sys, atexit\n"
        f"atexit.register(lambda: print([m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr))\n{code}"
    )
    done = subprocess.run([sys.executable, "-c", check], check=True, capture_output=True, text=True)
    return done.stderr.strip()


@pytest.mark.parametrize(
    "code",
    [
        "import mechanex",
        "import mechanex.steering, mechanex.generation, mechanex.errors, mechanex.client",
        "import mechanex; mechanex.Mechanex(); mechanex.load; mechanex.steering.get_vectors; dir(mechanex)",
        "import mechanex.cli",
    ],
)
def test_importing_loads_nothing_heavy(code: str) -> None:
    assert heavy_after(code) == "[]"


@pytest.mark.parametrize("command", [["--help"], ["--version"], ["steer", "--help"], ["demo", "--help"]])
def test_help_loads_nothing_heavy(command: list[str]) -> None:
    assert heavy_after(f"from mechanex.cli import main; main({command!r})") == "[]"
