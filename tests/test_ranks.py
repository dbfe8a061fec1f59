"""Processes that torchrun has started share the work, and each gets the whole result."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ranks_job
import torch
from torch import Tensor

import mechanex.distributed
from mechanex.engine.models.resolve import load
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


def check_alike(by_rank: list[dict[str, Any]], alone: dict[str, Any], most: float = 1e-5) -> None:
    """Results are the same bits in all processes, and those of one to rounding."""
    for rank, found in enumerate(by_rank):
        for name, wanted in alone.items():
            theirs = numbers(found[name])
            assert torch.equal(theirs, numbers(by_rank[0][name])), (rank, name)
            assert float((theirs - numbers(wanted)).norm() / numbers(wanted).norm()) < most, (rank, name)


def results(n: int, folder: Path) -> list[Any]:
    """What each process of a job found."""
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(n)]


@pytest.mark.ci
@pytest.mark.parametrize("n", [2, 3])
def test_the_result_is_that_of_one_process(n: int, tmp_path: Path) -> None:
    ran(n, "found", tmp_path)
    by_rank, alone = results(n, tmp_path), ranks_job.found()
    alone.pop("unseeded")
    check_alike(by_rank, alone)
    for found in by_rank:
        assert torch.equal(found["unseeded"], by_rank[0]["unseeded"])


@pytest.mark.ci
def test_attribution_is_that_of_one_process(tmp_path: Path) -> None:
    ran(3, "attributed", tmp_path)
    check_alike(results(3, tmp_path), ranks_job.attributed())


@pytest.mark.ci
def test_an_autoencoder_is_trained_on_the_same_batches_by_any_number_of_processes(tmp_path: Path) -> None:
    ran(3, "trained", tmp_path, tmp_path / "theirs")
    check_alike(results(3, tmp_path), ranks_job.trained(str(tmp_path / "own")))
    report = json.loads((tmp_path / "theirs" / "topk" / "report.json").read_text())
    assert report["steps"] == 12


@pytest.mark.ci
def test_activations_are_those_of_one_process_in_files_and_in_memory(tmp_path: Path) -> None:
    ran(2, "kept", tmp_path, tmp_path / "theirs")
    check_alike(results(2, tmp_path), ranks_job.kept(str(tmp_path / "own")))
    written = [[path.name for path in sorted((tmp_path / who).iterdir())] for who in ("own", "theirs")]
    assert written[0] == written[1] and len(written[0]) > 5


@pytest.mark.ci
def test_where_one_process_fails_all_end_and_say_why(tmp_path: Path) -> None:
    process = started(2, "failing", tmp_path)
    # The other one is told between two of its passes, and doesn't go through all of them.
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "process 1 of 2 failed, and this one stops with it" in errors
    assert "the second process is out of memory" in errors


def kill_one(begun: Callable[[], bool], after: float, *args: object) -> bool:
    """Starts a job of two processes, kills one some seconds after it has begun, and waits for the other to end.

    Returns:
        Whether it was killed before it had ended by itself.
    """
    process = started(2, *args, start_new_session=True)
    until = time.monotonic() + 120
    while not begun() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    time.sleep(after)
    workers = subprocess.run(
        ["pgrep", "-f", f"ranks_job.py {args[0]} {args[1]}"], capture_output=True, text=True, check=False
    )
    pids = [int(pid) for pid in workers.stdout.split() if int(pid) != process.pid]
    if pids:
        with contextlib.suppress(ProcessLookupError):  # it has ended since it was looked for
            os.kill(pids[-1], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0 or "SIGKILL" in errors
    return process.returncode != 0


@pytest.mark.ci
@pytest.mark.parametrize("after", [0.0, *(pytest.param(s / 2, marks=pytest.mark.long) for s in range(1, 9))])
def test_activations_of_a_job_that_is_killed_are_finished_by_the_next(after: float, tmp_path: Path) -> None:
    out = tmp_path / "theirs"

    def shards() -> list[Path]:
        return list(out.glob("activations-*"))

    killed = kill_one(lambda: len(shards()) >= 3, after, "kept", tmp_path, out, 0.1 if after else 0.5)
    left = {path: path.stat().st_mtime_ns for path in shards()}
    ran(3, "kept", tmp_path, out, 0)
    wanted = ranks_job.kept(str(tmp_path / "own"), "0")
    found = results(3, tmp_path)
    check_alike(found, wanted)
    assert len(left) >= 3 and (killed or after), "it was killed in the midst of it"
    unfinished = len(left) < len(list((tmp_path / "own").glob("activations-*")))
    assert unfinished or after
    assert not unfinished or all(path.stat().st_mtime_ns == at for path, at in left.items())


@pytest.mark.ci
@pytest.mark.parametrize("after", [0.5, *(pytest.param(s, marks=pytest.mark.long) for s in range(1, 10))])
def test_a_job_that_is_killed_goes_on_where_it_was_with_another_number_of_processes(
    after: float, tmp_path: Path
) -> None:
    checkpoint, wanted = tmp_path / "run.safetensors", ranks_job.optimized("")
    kill_one(checkpoint.exists, after, "optimized", tmp_path, checkpoint)
    ran(3, "optimized", tmp_path, checkpoint)
    for rank in range(3):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        assert found["iters"] == wanted["iters"] == 60
        assert float((found["vector"] - wanted["vector"]).norm() / wanted["vector"].norm()) < 1e-4


@pytest.mark.ci
def test_a_command_says_what_it_found_once() -> None:
    told = ran(2, "-m", "mechanex", "model", "paths", "mx-tiny")
    assert told.count("model.layers.2.self_attn.q_proj\n") == 1


@pytest.mark.ci
def test_heavy_commands_end_well_and_only_the_first_process_speaks(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    ran(2, "commands", tmp_path, tmp_path / "work")
    first, second = results(2, tmp_path)
    assert len(first) == len(second) == len(ranks_job.COMMANDS)
    for (line, code, printed), (_, other, nothing) in zip(first, second, strict=True):
        assert code == other == 0, (line, printed)
        assert printed and not nothing, line
    files = {path.name for path in (tmp_path / "work").rglob("*")}
    assert {"sweep.json", "report.html", "loss.png", "sae_weights.safetensors", "model.safetensors"} <= files
    assert not [name for name in files if name.endswith(".tmp")]


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
    assert (
        current_ranks(None) == SINGLE and mechanex.distributed.is_first() and mechanex.distributed.size() == 1
    )
    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)
    with mechanex.distributed.alone():
        assert current_ranks(None) == SINGLE
    monkeypatch.setenv("MECHANEX_DISTRIBUTED", "0")
    assert current_ranks(None) == SINGLE


def test_a_server_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValidationError, match="split the model over them with --tp"):
        serve(load("mx-tiny", backend="transformers"))
