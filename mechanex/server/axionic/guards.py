"""What the Axionic API counts and bounds, so that no client takes the server from the others."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request, Response

from ...errors import AuthenticationError, RateLimitError, ValidationError
from ..accounts.auth import Principal, is_open, principal
from ..accounts.store import store_of
from ..http.limits import RateLimit, client_address
from ..http.routes import Route
from ..library.threads import look_up, run_sync
from ..model.engine import Engine
from ..settings import ServerSettings

__all__ = ["CountedRoute", "Guards", "Sender", "Worker", "guards_of"]

T = TypeVar("T")

LOGINS_PER_MINUTE = 10
"""Wrong passwords for one email address from one client, so that nobody can lock out others."""

LOGINS_FROM_ALL = 100
"""Wrong passwords for one email address, from wherever they come."""

# A password's hash takes 64 MiB while it is computed.
HASHES_AT_ONCE = 2

# Each takes a tenth of a second or more, so that the last of them waits no more than a few.
HASHES_WAITING = 32


class Guards:
    """The counters of one application.

    Args:
        settings: the rates.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self.addresses = RateLimit("account requests from this address", settings.rate_limit)
        self.accounts = RateLimit("requests of this account", settings.api_rate_limit)
        self._logins = RateLimit("attempts to log in to this account", LOGINS_PER_MINUTE)
        self._logins_from_all = RateLimit("attempts to log in to this account", LOGINS_FROM_ALL)
        self._hashing = asyncio.Semaphore(HASHES_AT_ONCE)
        self._n_hashing = 0
        self._busy: set[str] = set()

    async def hashing(self, work: Callable[[], T]) -> T:
        """Does work that hashes a password, in a thread.

        Raises:
            RateLimitError: too many others wait for that already.
        """
        if self._n_hashing >= HASHES_AT_ONCE + HASHES_WAITING:
            raise RateLimitError("Too many log in at once: try again in 5 s.", 429, retry_after=5)
        self._n_hashing += 1
        try:
            async with self._hashing:
                return await run_sync(work)
        finally:
            self._n_hashing -= 1

    @contextmanager
    def logging_in(self, address: str, email: str) -> Iterator[None]:
        """Counts an attempt, and keeps it counted where it ends with an AuthenticationError.

        Raises:
            RateLimitError: too many for this email address, from this client or from all.
        """
        here = f"{address} {email}"
        self._logins.take(here)
        self._logins_from_all.take(email)
        wrong = False
        try:
            yield
        except AuthenticationError:
            wrong = True
            raise
        finally:
            if not wrong:
                self._logins.give_back(here)
                self._logins_from_all.give_back(email)

    @contextmanager
    def one_at_a_time(self, who: Principal) -> Iterator[None]:
        """Holds the account's place for work that keeps the model from others; the operator has as many as it likes.

        Raises:
            RateLimitError: the account's place is taken.
        """
        if who.account_id is None:
            yield
            return
        if who.account_id in self._busy:
            raise RateLimitError(
                "Something of this account is being computed: ask again when it is done.", 429, retry_after=5
            )
        self._busy.add(who.account_id)
        try:
            yield
        finally:
            self._busy.discard(who.account_id)


def guards_of(request: Request) -> Guards:
    """The guards of the application that a request came to."""
    guards: Guards = request.app.state.guards
    return guards


class CountedRoute(Route):
    """A route that counts a request of an address before it reads the body.

    Where a proxy stands before the server that it was not told to trust, all have the same address.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def count_and_handle(request: Request) -> Response:
            if not is_open(request):
                address = client_address(request.client.host if request.client else None)
                guards_of(request).addresses.take(address)
            return await handle(request)

        return count_and_handle


async def _limited(request: Request, who: Annotated[Principal, Depends(principal)]) -> Principal:
    if not is_open(request):
        guards_of(request).accounts.take(who.account_id or "")
    return who


Sender = Annotated[Principal, Depends(_limited)]
"""The sender of a request that counts against its account's rate."""


async def _worker(request: Request, engine: Engine, who: Sender) -> Principal:
    """The sender of a request for the model: one whose account didn't ask for another model."""
    if who.account_id is not None:
        chosen = (await look_up(store_of(request).users.get, who.account_id)).model_name
        served = engine.model_name
        if chosen is not None and chosen != served:
            raise ValidationError(
                f"this account chose the model {chosen!r}, and this server runs {served!r} now: choose it with "
                "POST /auth/api-keys/set-model, or use another server."
            )
    return who


Worker = Annotated[Principal, Depends(_worker)]
"""The sender of a request for the model: one whose account didn't ask for another model."""
