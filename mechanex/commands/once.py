"""What only one process of a job does for all: looking whether something is there, and writing files."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from ..launched import global_rank

__all__ = ["once"]

_T = TypeVar("_T")


def once(do: Callable[[], _T]) -> _T:
    """Has the first process of a job do something while the others wait; its result, or its error, is everyone's."""
    if global_rank() is None:
        return do()
    from ..engine.ranks import current_ranks

    return current_ranks(None).from_first(do)
