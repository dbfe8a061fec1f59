"""Benchmarks read the tests' op table and run under the tests' settings."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import pytest


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MECHANEX_HOME", str(tmp_path / "home"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    import torch

    torch.manual_seed(0)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-results", action="store_true", help="write benchmarks/RESULTS.md and a JSON")
    parser.addoption("--compare", metavar="JSON", help="compare with an earlier run's JSON")


@pytest.fixture(scope="session")
def report(request: pytest.FixtureRequest):  # type: ignore[no-untyped-def]
    """Collects what the benchmarks find; shown, compared and written at the end."""
    from report import Report

    found = Report()
    yield found
    found.finish()
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print("\n" + found.tables(markdown=False))
        if request.config.getoption("--compare"):
            print(found.compared(Path(request.config.getoption("--compare"))))
    if request.config.getoption("--write-results"):
        found.write(Path(__file__).parent)
