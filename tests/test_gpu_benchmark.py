"""``benchmarks/gpu/run.sh`` takes its times whatever the tests say, and tells how they ended."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu" / "run.sh"

# In place of Python: tests and timings end as the variables say.
PYTHON = """#!/bin/sh
case "$*" in
  *"-m pytest"*) exit "$TESTS" ;;
  *timings.py*) echo "timings: $*"; exit "$TIMINGS" ;;
  *"import xdist"*) exit 1 ;;
esac
"""

pytestmark = pytest.mark.skipif(
    not SCRIPT.exists() or shutil.which("bash") is None, reason="needs a source tree and bash"
)


@pytest.mark.parametrize(
    ("tests", "timings", "status", "said"),
    [(0, 0, 0, "passed"), (1, 0, 1, "failed (1)"), (1, 3, 3, "failed (1)"), (0, 3, 3, "passed")],
)
def test_it_times_also_where_tests_fail_and_says_so(
    tests: int, timings: int, status: int, said: str, tmp_path: Path
) -> None:
    for folder in ("benchmarks/gpu", "scripts", "tests", "results"):
        (tmp_path / folder).mkdir(parents=True)
    for path, text in {"python": PYTHON, "scripts/stage.sh": "#!/bin/sh\n"}.items():
        (tmp_path / path).write_text(text)
        (tmp_path / path).chmod(0o755)
    copy = shutil.copy(SCRIPT, tmp_path / "benchmarks" / "gpu" / "run.sh")
    done = subprocess.run(
        ["bash", copy, "results"],
        cwd=tmp_path,
        env=os.environ | {"PYTHON": str(tmp_path / "python"), "TESTS": str(tests), "TIMINGS": str(timings)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == status, done.stderr
    assert "timings:" in done.stdout and f"--tests {said}" in done.stdout
    assert "== done" in done.stdout
    assert ("tests failed (1): the timings that follow say so" in done.stderr) == (tests == 1)
