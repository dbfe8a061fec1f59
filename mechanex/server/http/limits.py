"""How often one client may ask, counted in memory."""

from __future__ import annotations

import ipaddress
import math
import time

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import FixedWindowRateLimiter

from ...errors import RateLimitError

__all__ = ["RateLimit", "client_address"]


class RateLimit:
    """Lets each client ask ``per_minute`` times in a minute that begins with the first; then it is forgotten.

    Args:
        what: named in the error.
        per_minute: requests.
    """

    def __init__(self, what: str, per_minute: int) -> None:
        self._what, self._item = what, RateLimitItemPerMinute(per_minute)
        self._storage = MemoryStorage()
        self._limiter = FixedWindowRateLimiter(self._storage)

    def take(self, client: str) -> None:
        """Counts one request.

        Raises:
            RateLimitError: too many; ``retry_after`` is when the next one may come, in whole seconds.
        """
        self.check(client)
        if not self._limiter.hit(self._item, client):  # another thread took the last one
            self.give_back(client)
            raise self._refusal(client)

    def check(self, client: str) -> None:
        """Raises what ``take`` would, and counts nothing."""
        if not self._limiter.test(self._item, client):
            raise self._refusal(client)

    def _refusal(self, client: str) -> RateLimitError:
        ends_at = self._limiter.get_window_stats(self._item, client).reset_time
        wait = max(1, math.ceil(ends_at - time.time()))
        return RateLimitError(
            f"Too many {self._what}: at most {self._item.amount} a minute. Try again in {wait} s.",
            429,
            retry_after=wait,
        )

    def give_back(self, client: str) -> None:
        """Uncounts one request."""
        key = self._item.key_for(client)
        if self._storage.get(key):  # else its minute is over
            self._storage.decr(key)


def client_address(host: str | None) -> str:
    """What counts as one client: an IPv4 address, or a network of IPv6, where each client has 2**64 addresses."""
    try:
        address = ipaddress.ip_address(host or "")
    except ValueError:
        return host or "?"
    if isinstance(address, ipaddress.IPv6Address):
        return str(address.ipv4_mapped or ipaddress.ip_network((address, 64), strict=False))
    return str(address)
