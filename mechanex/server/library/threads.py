"""Threads for what waits for the database: their own, so that nothing else waits where somebody holds it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from anyio import CapacityLimiter, to_thread
from anyio.lowlevel import RunVar

__all__ = ["look_up", "run_sync"]

T = TypeVar("T")

# Together, and with the one that notes the use of keys, no more than the connections that SQLAlchemy keeps: 15.
_AT_WORK = 6
_LOOKING_UP = 8

_Limiter = RunVar[CapacityLimiter]
_at_work: _Limiter = RunVar("mechanex_database_work")
_looking_up: _Limiter = RunVar("mechanex_database_look_ups")


async def run_sync(fn: Callable[..., T], *args: Any) -> T:
    """The result of a function that may write to the database, or else wait for those who do."""
    return await to_thread.run_sync(fn, *args, limiter=_limiter(_at_work, _AT_WORK))


async def look_up(fn: Callable[..., T], *args: Any) -> T:
    """The result of a function that only reads, which texts wait for; who writes doesn't keep it waiting."""
    return await to_thread.run_sync(fn, *args, limiter=_limiter(_looking_up, _LOOKING_UP))


def _limiter(of_loop: _Limiter, threads: int) -> CapacityLimiter:
    try:
        return of_loop.get()
    except LookupError:
        limiter = CapacityLimiter(threads)
        of_loop.set(limiter)
        return limiter
