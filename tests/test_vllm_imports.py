"""What vLLM's environment has not: the middleware and the launch need none of it; options for vLLM's own command."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from mechanex.vllm.capacity import Capacity

MISSING = ("sqlalchemy", "alembic", "limits", "argon2", "zxcvbn", "llguidance", "prometheus_client")


def test_the_middleware_needs_nothing_of_our_own_servers() -> None:
    program = f"""
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {MISSING!r}:
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Missing())
import mechanex.vllm.launch, mechanex.vllm.middleware
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_vllms_own_command_takes_our_options() -> None:
    """A shell splits what is printed at spaces, and at nothing else."""
    command = [sys.executable, "-m", "mechanex.vllm.options", "--slots=8", "--rank=2", "--behaviors"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    options = dict(one.removeprefix("--").split("=", 1) for one in printed.split())
    assert options.keys() == {"worker-cls", "scheduler-cls", "middleware", "additional-config"}
    stated = Capacity.of(json.loads(options["additional-config"]))
    assert stated == Capacity(slots=8, rank=2, behaviors=True)


@pytest.mark.parametrize("wrong", ["--slots=0", "--slots=many", "--slot=8"])
def test_wrong_options_start_no_server_that_does_not_steer(wrong: str) -> None:
    """In ``vllm serve MODEL $(…)`` the shell loses the status, and vLLM would start with what is left."""
    command = [sys.executable, "-m", "mechanex.vllm.options", wrong]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stdout.strip() == "--mechanex-options-are-wrong"
    assert done.stderr.startswith("Error: ") and "Traceback" not in done.stderr
