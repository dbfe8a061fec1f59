"""The command line as torchrun starts it in test_serve_split.py: processes wait for each other a few seconds only."""

from __future__ import annotations

from datetime import timedelta

from mechanex.cli import main
from mechanex.server.model import wire, worker

PATIENCE = 6.0

if __name__ == "__main__":
    wire.PATIENCE = timedelta(seconds=PATIENCE)
    worker._BEAT = 1.0
    main()
