"""Long work on a model lets others at it: between two passes it pauses, for whoever asked to be let in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = ["pause", "pausing"]

_pause: ContextVar[Callable[[], None] | None] = ContextVar("mechanex_pause", default=None)


@contextmanager
def pausing(fn: Callable[[], None]) -> Iterator[None]:
    """Has the work inside the block call ``fn`` between its passes, in its own thread.

    Then no edit of the work's own is on the model. What ``fn`` raises ends the work.
    """
    token = _pause.set(fn)
    try:
        yield
    finally:
        _pause.reset(token)


def pause() -> None:
    """Called by long work where it leaves the model as it found it: between passes, with no hook that edits."""
    fn = _pause.get()
    if fn is not None:
        fn()
