"""``benchmarks/gpu/run.sh`` runs its parts alone or together, and takes times whatever the tests say, telling so."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu" / "run.sh"

# In place of Python: tests and timings end as the variables say.
PYTHON = """#!/bin/sh
case "$*" in
  *"-m pytest"*) exit "$TESTS" ;;
  *steer.py*|*logprob.py*|*work.py*|*decode.py*)
    echo "timings: $*"; [ -z "$WRITES" ] || echo "{}" >"$2/$WRITES"; exit "$TIMINGS" ;;
  *record.py*) echo "judged: $*" ;;
  *"import xdist"*) exit 1 ;;
esac
"""

pytestmark = [
    pytest.mark.ci,
    pytest.mark.skipif(
        not SCRIPT.exists() or shutil.which("bash") is None, reason="needs a source tree and bash"
    ),
]


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a copy of the script with a Python that only says what it was asked."""
    for folder in ("benchmarks/gpu", "scripts", "tests", "results"):
        (tmp_path / folder).mkdir(parents=True)
    stage = '#!/bin/sh\necho "$1" >>staged; mkdir -p "$1"\n'
    for path, text in {"python": PYTHON, "scripts/stage.sh": stage}.items():
        (tmp_path / path).write_text(text)
        (tmp_path / path).chmod(0o755)
    copy = shutil.copy(SCRIPT, tmp_path / "benchmarks" / "gpu" / "run.sh")

    def run(
        *arguments: str, tests: int = 0, timings: int = 0, writes: str = "gpu.json", **variables: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", copy, *arguments],
            cwd=tmp_path,
            env=os.environ
            | {"PYTHON": str(tmp_path / "python"), "TESTS": str(tests), "TIMINGS": str(timings)}
            | {"WRITES": writes, **variables},
            capture_output=True,
            text=True,
            check=False,
        )

    return run


@pytest.mark.parametrize(
    ("tests", "timings", "status", "said"),
    [(0, 0, 0, "passed"), (1, 0, 1, "failed (1)"), (1, 3, 3, "failed (1)"), (0, 3, 3, "passed")],
)
def test_it_times_also_where_tests_fail_and_says_so(
    tests: int, timings: int, status: int, said: str, run: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    done = run("results", tests=tests, timings=timings)
    assert done.returncode == status, done.stderr
    timed = [line for line in done.stdout.splitlines() if line.startswith("timings:")]
    assert [Path(line.split()[1]).stem for line in timed] == ["steer", "logprob", "work", "decode"]
    assert all(f"--tests {said}" in line for line in timed)
    assert "== done" in done.stdout
    assert ("tests failed (1): the timings that follow say so" in done.stderr) == (tests == 1)


def test_parts_run_alone_on_what_was_built_before(
    tmp_path: Path, run: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    done = run("results", "--only", "decode", "--", "--rows", "1")
    assert done.returncode == 0, done.stderr
    (timed,) = (line for line in done.stdout.splitlines() if line.startswith("timings:"))
    assert "decode.py" in timed and timed.endswith("--tests not run --rows 1")
    run("results", "--only", "decode,steer")
    # Built for the first, since there was nothing, and only then.
    assert len((tmp_path / "staged").read_text().splitlines()) == 1
    run("results", "--only", "build")
    assert len((tmp_path / "staged").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("parts", "judged"),
    [("steer,ranks", True), ("ranks", False), ("build", False), ("test", False), ("work", True)],
)
def test_goals_are_told_of_whatever_was_timed(
    parts: str, judged: bool, run: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    done = run("results", "--only", parts)
    assert done.returncode == 0, done.stderr
    assert ("== goals" in done.stdout) is judged


def test_goals_are_those_of_what_this_run_wrote(
    tmp_path: Path, run: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    folder = tmp_path / "results"
    for name in ("cpu-1.json", "of another day.json"):
        (folder / name).write_text('{"machine": {}, "rows": []}')
    done = run("results", "--only", "steer,work")
    (judged,) = (line.split(maxsplit=2)[2] for line in done.stdout.splitlines() if line.startswith("judged:"))
    assert Path(judged) == folder / "gpu.json"
    done = run("results", "--only", "steer", timings=3, writes="")
    assert done.returncode == 3 and "judged:" not in done.stdout
    assert "nothing was written" in done.stdout
    done = run("results/gpu.json", "--only", "steer", timings=3, writes="")
    assert done.returncode == 3 and "judged:" not in done.stdout


def test_what_there_is_no_time_for_is_skipped(
    tmp_path: Path, run: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    (tmp_path / "build" / "gpu" / "site").mkdir(parents=True)
    done = run("results", "--only", "test,steer,decode", LIMIT="0")
    assert done.returncode == 124 and "timings:" not in done.stdout
    assert done.stderr.count("skipped:") == 3


def test_parts_that_are_not_told_are_asked_for(
    run: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    done = run("results", "--only")
    assert done.returncode == 2 and "--only takes parts" in done.stderr


def test_a_file_of_other_benchmarks_is_not_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "cpu-1.json"
    other.write_text('{"machine": {}, "rows": []}')
    assert "is no result of run.sh" in str(_main(monkeypatch, "record", str(other)))


def test_unknown_parts_are_refused(run: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = run("results", "--only", "steer,decoding")
    assert done.returncode == 2 and "unknown part decoding" in done.stderr


PARTS = {
    "steer": ((), "share of copy", "launch: torch add", "times the fastest"),
    "logprob": ((), "share of product", "times as fast as whole logits"),
    "work": (
        (),
        "optimization step, 8 x (1 + 1), layer 2 of 4, tiny: times what it can't do without",
        "optimization step of 4 jobs",
        "scoring 128 pairs",
        "all layers",
    ),
    "decode": (
        ("--rows", "1,3", "--quick"),
        "first request after loading",
        "float32, steered: rows with the tokens of eager runs alone",
        "against plain",
        "graphs captured by rows that join with other vectors",
        "3 rows: ours, 64 behaviors watched",
        "64 clients, steered eight ways",
        "3 rows: ours, plain, against transformers, static cache compiled",
    ),
}


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads of tensors as small as these wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("part", PARTS)
def test_every_part_runs_to_its_end(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the CPU and with sizes at which times mean nothing."""
    options, *expected = PARTS[part]
    assert _main(monkeypatch, part, str(tmp_path), "--device", "cpu", "--tiny", *options) == 0
    (path,) = tmp_path.glob("*.json")
    found = json.loads(path.read_text())[part]
    assert found["machine"]["torch"] == torch.__version__ and found["machine"]["date"]
    for text in expected:
        assert any(text in row["what"] for row in found["rows"]), text
    assert all(row["value"] is not None for row in found["rows"])
    judged = [row for row in found["rows"] if "goal" in row]
    capsys.readouterr()
    assert _main(monkeypatch, "record", str(path)) == 0
    said = capsys.readouterr().out
    assert f"{sum(row['met'] for row in judged)} of {len(judged)} goals met" in said
    if part == "steer":
        assert "| 8 clamps by row with strengths | 16x256 |" in said


def _main(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: str) -> object:
    """Runs a script of the folder as a program; what it ends with."""
    script = SCRIPT.parent / f"{name}.py"
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    return ended.value.code
