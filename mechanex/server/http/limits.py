"""How often one client may ask, counted in memory."""

from __future__ import annotations

import ipaddress
import math
import time

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import FixedWindowRateLimiter

from ...errors import RateLimitError, ValidationError

__all__ = ["RateLimit", "client_address"]


class RateLimit:
    """Lets each client have ``per_minute`` of something in a minute that begins with the first; then it is forgotten.

    Args:
        what: named in the error.
        per_minute: requests, or tokens.
    """

    def __init__(self, what: str, per_minute: int) -> None:
        self._what, self._item = what, RateLimitItemPerMinute(per_minute)
        self._storage = MemoryStorage()
        self._limiter = FixedWindowRateLimiter(self._storage)

    def take(self, client: str, n: int = 1) -> None:
        """Counts one request, or n tokens.

        Raises:
            RateLimitError: too many; ``retry_after`` is when the next may come, in whole seconds.
            ValidationError: more than there are in a minute.
        """
        self.check(client, n)
        if not self._limiter.hit(self._item, client, cost=n):  # another thread took the last one
            self.give_back(client, n)
            raise self._refusal(client)

    def check(self, client: str, n: int = 1) -> None:
        """Raises what ``take`` would, and counts nothing."""
        if n > self._item.amount:
            raise ValidationError(
                f"{n} {self._what} are asked for at once, and this server gives {self._item.amount} a minute: ask for "
                "less."
            )
        if not self._limiter.test(self._item, client, cost=n):
            raise self._refusal(client)

    def headers(self, client: str, of: str) -> dict[str, str]:
        """What is left to a client, as OpenAI's headers tell it: ``x-ratelimit-remaining-OF`` and its like."""
        ends_at, left = self._limiter.get_window_stats(self._item, client)
        return {
            f"x-ratelimit-limit-{of}": str(self._item.amount),
            f"x-ratelimit-remaining-{of}": str(max(0, left)),
            f"x-ratelimit-reset-{of}": f"{max(0, math.ceil(ends_at - time.time()))}s",
        }

    def _refusal(self, client: str) -> RateLimitError:
        ends_at = self._limiter.get_window_stats(self._item, client).reset_time
        wait = max(1, math.ceil(ends_at - time.time()))
        return RateLimitError(
            f"Too many {self._what}: at most {self._item.amount} a minute. Try again in {wait} s.",
            429,
            retry_after=wait,
        )

    def give_back(self, client: str, n: int = 1) -> None:
        """Uncounts what was taken."""
        key = self._item.key_for(client)
        if self._storage.get(key):  # else its minute is over
            self._storage.decr(key, n)


def client_address(host: str | None) -> str:
    """What counts as one client: an IPv4 address, or a network of IPv6, where each client has 2**64 addresses."""
    try:
        address = ipaddress.ip_address(host or "")
    except ValueError:
        return host or "?"
    if isinstance(address, ipaddress.IPv6Address):
        return str(address.ipv4_mapped or ipaddress.ip_network((address, 64), strict=False))
    return str(address)
