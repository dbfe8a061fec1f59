"""Commands of several processes: the first one tells of the work, each of its own errors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from mechanex.cli import main


@pytest.fixture(params=["0", "1"])
def rank(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    of = {"RANK": request.param, "LOCAL_RANK": request.param, "WORLD_SIZE": "2"}
    for name, value in {**of, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    yield request.param


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(main, [str(one) for one in arguments])


def before(rank: str) -> str:
    return "Error: " if rank == "0" else f"Error in process {rank}: "


def test_an_error_that_one_process_alone_has_is_told_by_it(rank: str, tmp_path: Path) -> None:
    result = run("vectors", "show", tmp_path / "none.safetensors")
    assert result.exit_code == 1 and result.stderr.startswith(before(rank))
    assert "none.safetensors" in result.stderr and not result.stdout


def test_wrong_usage_ends_every_process_alike(rank: str) -> None:
    result = run("activations", "mx-tiny")
    assert result.exit_code == 2 and f"{before(rank)}Missing argument" in result.stderr


def test_the_first_process_alone_says_what_was_found(rank: str) -> None:
    result = run("sae", "list")
    assert result.exit_code == 0 and ("mx-tiny" in result.stdout) == (rank == "0") and not result.stderr
    assert bool(run("--version").stdout) == (rank == "0")
