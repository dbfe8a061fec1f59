"""The command line as torchrun starts it in test_serve_split.py: processes wait for each other a few seconds only."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from mechanex.cli import main
from mechanex.engine.decode.calls import Calls
from mechanex.server.model import wire, worker

PATIENCE = 12.0
STUCK = "MECHANEX_TEST_STUCK"
"""Names a file: once it is there, passes of the batch take a minute, and the file says that one has begun."""
STUCK_IN = "MECHANEX_TEST_STUCK_IN"
"""In which processes, such as ``0,1``: where not in all, the others wait in the midst of a pass for these."""
FAILING = "MECHANEX_TEST_FAILING"
"""Names a file: once it is there, the thread of the model fails."""

_run, _sweep = Calls.__call__, worker.Worker._sweep


def _stuck(*args: Any) -> Any:
    file = Path(os.environ[STUCK])
    if file.exists() and os.environ["RANK"] in os.environ[STUCK_IN].split(","):
        file.write_text("begun")
        time.sleep(60)
    return _run(*args)


def _failing(one: worker.Worker) -> None:
    if Path(os.environ[FAILING]).exists():
        raise ValueError("the test has made it fail")
    _sweep(one)


if __name__ == "__main__":
    wire.PATIENCE = timedelta(seconds=PATIENCE)
    worker._BEAT = 1.0
    if STUCK in os.environ:
        Calls.__call__ = _stuck  # type: ignore[method-assign]
    if FAILING in os.environ:
        worker.Worker._sweep = _failing  # type: ignore[method-assign]
    main()
