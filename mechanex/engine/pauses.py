"""Long work on a model lets others at it: between two passes it pauses, for whoever asked to be let in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = ["pass_tokens", "pause", "pausing"]

_pause: ContextVar[Callable[[], None] | None] = ContextVar("mechanex_pause", default=None)
_pass_tokens: ContextVar[int | None] = ContextVar("mechanex_pass_tokens", default=None)


@contextmanager
def pausing(fn: Callable[[], None], pass_tokens: int | None = None) -> Iterator[None]:
    """Has the work inside the block call ``fn`` between its passes, in its own thread.

    Then no edit of the work's own is on the model. What ``fn`` raises ends the work.

    Args:
        fn: lets others at the model.
        pass_tokens: how many tokens a pass may have at most, unless one text alone is longer.
    """
    tokens = _pause.set(fn), _pass_tokens.set(pass_tokens)
    try:
        yield
    finally:
        _pause.reset(tokens[0])
        _pass_tokens.reset(tokens[1])


def pass_tokens(usual: int) -> int:
    """Tokens that a pass of the present work has: as usual, or fewer where others are not to wait for so long."""
    most = _pass_tokens.get()
    return usual if most is None else min(usual, most)


def pause() -> None:
    """Called by long work where it leaves the model as it found it: between passes, with no hook that edits."""
    fn = _pause.get()
    if fn is not None:
        fn()
