"""Whether ``torchrun`` or ``accelerate launch`` started this process as one of several, as the environment tells."""

from __future__ import annotations

import os

__all__ = ["SWITCH", "global_rank", "local_rank"]

_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
SWITCH = "MECHANEX_DISTRIBUTED"
"""At 0 every process works by itself, whatever has started it."""


def global_rank() -> int | None:
    """Which of all processes of the job this one is; None where there is no other."""
    return _number("RANK")


def local_rank() -> int | None:
    """Which of this machine's processes of the job this one is; None where the job has no other."""
    return _number("LOCAL_RANK")


def _number(name: str) -> int | None:
    if os.environ.get(SWITCH) == "0" or any(variable not in os.environ for variable in _VARIABLES):
        return None
    try:
        return int(os.environ[name]) if int(os.environ["WORLD_SIZE"]) > 1 else None
    except ValueError:
        return None
