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

PATIENCE = 6.0
STUCK = "MECHANEX_TEST_STUCK"
"""Names a file: once it is there, passes of the batch take a minute."""

_run = Calls.__call__


def _stuck(*args: Any) -> Any:
    if Path(os.environ[STUCK]).exists():
        time.sleep(60)
    return _run(*args)


if __name__ == "__main__":
    wire.PATIENCE = timedelta(seconds=PATIENCE)
    worker._BEAT = 1.0
    if STUCK in os.environ:
        Calls.__call__ = _stuck  # type: ignore[method-assign]
    main()
