"""What vLLM's environment has not: the middleware and the launch need none of it."""

from __future__ import annotations

import subprocess
import sys

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
