"""Which process of a job this one is, where ``torchrun`` or ``accelerate launch`` has started several.

Extraction, scoring, optimization and doses share their work among the processes by themselves (docs/scale.md): each
calls the same functions with the same arguments, and gets the whole result. These functions are for what only one of
them should do, such as printing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["alone", "is_first", "rank", "size"]


def rank() -> int:
    """This process's number, from 0; 0 where there is only one."""
    from .engine.ranks import current_ranks

    return current_ranks(None).rank


def size() -> int:
    """How many processes share the work; 1 where nothing has started several."""
    from .engine.ranks import current_ranks

    return current_ranks(None).size


def is_first() -> bool:
    """Whether this is the process that prints and writes."""
    return rank() == 0


@contextmanager
def alone() -> Iterator[None]:
    """Runs a block in this process by itself: for work that not all processes do.

    Without it a call that only some processes make waits for the others.
    """
    from .engine.ranks import alone

    with alone():
        yield
