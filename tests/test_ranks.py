"""Processes that torchrun has started share the work, and each gets the whole result."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import ranks_job
import torch
from torch import Tensor

import mechanex.distributed
from mechanex.engine.ranks import SINGLE, Ranks, current_ranks
from mechanex.errors import ValidationError
from mechanex.serving import serve

JOB = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
LAUNCHED = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


def started(n: int, *args: object, **options: Any) -> subprocess.Popen[str]:
    """A job of n processes."""
    script = [str(Path(ranks_job.__file__))] if args[0] != "-m" else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
    return subprocess.Popen(
        [*JOB, str(n), *script, *map(str, args)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def ran(n: int, *args: object) -> str:
    process = started(n, *args)
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-3000:]
    return out


def numbers(value: Any) -> Tensor:
    """Everything in a result, side by side."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return torch.cat([numbers(one) for one in value])
    return torch.as_tensor(value).double().flatten()


@pytest.mark.ci
@pytest.mark.parametrize("n", [2, 3])
def test_the_result_is_that_of_one_process(n: int, tmp_path: Path) -> None:
    ran(n, "found", tmp_path)
    by_rank = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(n)]
    alone = ranks_job.found()
    alone.pop("unseeded")
    for rank, found in enumerate(by_rank):
        for name, wanted in alone.items():
            theirs = numbers(found[name])
            assert torch.equal(theirs, numbers(by_rank[0][name])), (rank, name)
            assert float((theirs - numbers(wanted)).norm() / numbers(wanted).norm()) < 1e-5, (rank, name)
        assert torch.equal(found["unseeded"], by_rank[0]["unseeded"])


@pytest.mark.ci
def test_activations_in_files_are_written_once_and_opened_by_all(tmp_path: Path) -> None:
    ran(2, "kept", tmp_path, tmp_path / "theirs")
    wanted = ranks_job.kept(str(tmp_path / "own"))
    for rank in range(2):
        assert torch.load(tmp_path / f"{rank}.pt", weights_only=False) == wanted


@pytest.mark.ci
def test_where_one_process_fails_all_end_and_say_why(tmp_path: Path) -> None:
    process = started(2, "failing", tmp_path)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "process 1 of 2 failed, and this one stops with it" in errors
    assert "the second process is out of memory" in errors


@pytest.mark.ci
@pytest.mark.parametrize("after", [0.5, *(pytest.param(s, marks=pytest.mark.long) for s in range(1, 10))])
def test_a_job_that_is_killed_goes_on_where_it_was_with_another_number_of_processes(
    after: float, tmp_path: Path
) -> None:
    checkpoint, wanted = tmp_path / "run.safetensors", ranks_job.optimized("")
    process = started(2, "optimized", tmp_path, checkpoint, start_new_session=True)
    until = time.monotonic() + 120
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    time.sleep(after)
    workers = subprocess.run(
        ["pgrep", "-f", f"ranks_job.py optimized {tmp_path}"], capture_output=True, text=True, check=False
    )
    pids = [int(pid) for pid in workers.stdout.split() if int(pid) != process.pid]
    if pids:
        os.kill(pids[-1], signal.SIGKILL)
    process.communicate(timeout=60)
    assert not pids or process.returncode != 0 or (tmp_path / "0.pt").exists()
    ran(3, "optimized", tmp_path, checkpoint)
    for rank in range(3):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        assert found["iters"] == wanted["iters"] == 60
        assert float((found["vector"] - wanted["vector"]).norm() / wanted["vector"].norm()) < 1e-4


@pytest.mark.ci
def test_a_command_says_what_it_found_once() -> None:
    told = ran(2, "-m", "mechanex", "model", "paths", "mx-tiny")
    assert told.count("model.layers.2.self_attn.q_proj\n") == 1


def test_packs_are_dealt_evenly_and_alike_everywhere() -> None:
    sizes = [7, 30, 12, 12, 3, 25, 18, 9, 1]
    shares = [Ranks(rank, 3).share(sizes) for rank in range(3)]
    assert sorted(place for share in shares for place in share) == list(range(len(sizes)))
    loads = [sum(sizes[place] for place in share) for share in shares]
    assert max(loads) - min(loads) <= 3
    assert Ranks(1, 3).share([5]) == []
    assert SINGLE.share(sizes) == list(range(len(sizes)))


def test_one_process_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    assert current_ranks() == SINGLE and mechanex.distributed.is_first() and mechanex.distributed.size() == 1
    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)
    with mechanex.distributed.alone():
        assert current_ranks() == SINGLE
    monkeypatch.setenv("MECHANEX_DISTRIBUTED", "0")
    assert current_ranks() == SINGLE


def test_a_server_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValidationError, match="a server is one process"):
        serve(None)  # type: ignore[arg-type]
