"""How often one client may ask: token buckets in memory, one per client."""

from __future__ import annotations

import ipaddress
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from ...errors import RateLimitError

__all__ = ["RateLimit", "client_address"]


@dataclass
class _Bucket:
    tokens: float
    filled_at: float


class RateLimit:
    """Lets each client ask ``per_minute`` times at once, and then as often as a minute brings new chances.

    Args:
        what: named in the error.
        per_minute: requests.
        clock: seconds, never going back.
        clients: most clients that are remembered; the one that was silent longest is forgotten first.
    """

    def __init__(
        self,
        what: str,
        per_minute: int,
        *,
        clock: Callable[[], float] = time.monotonic,
        clients: int = 10_000,
    ) -> None:
        self._what = what
        self._size = per_minute
        self._clock = clock
        self._clients = clients
        self._buckets: OrderedDict[str, _Bucket] = OrderedDict()
        self._lock = threading.Lock()

    def take(self, client: str) -> None:
        """Counts one request.

        Raises:
            RateLimitError: too many; ``retry_after`` is when the next one may come, in whole seconds.
        """
        self._spend(client, 1)

    def check(self, client: str) -> None:
        """Raises what ``take`` would, and counts nothing."""
        if client in self._buckets:
            self._spend(client, 0)

    def _spend(self, client: str, tokens: int) -> None:
        now, rate = self._clock(), self._size / 60
        with self._lock:
            bucket = self._buckets.setdefault(client, _Bucket(self._size, now))
            self._buckets.move_to_end(client)
            if len(self._buckets) > self._clients:
                self._buckets.popitem(last=False)
            bucket.tokens = min(self._size, bucket.tokens + (now - bucket.filled_at) * rate)
            bucket.filled_at = now
            if bucket.tokens >= 1:
                bucket.tokens -= tokens
                return
            wait = math.ceil((1 - bucket.tokens) / rate)
        raise RateLimitError(
            f"Too many {self._what}: at most {self._size} a minute. Try again in {wait} s.",
            429,
            retry_after=wait,
        )

    def give_back(self, client: str) -> None:
        """Uncounts one request."""
        with self._lock:
            bucket = self._buckets.get(client)
            if bucket is not None:
                bucket.tokens = min(self._size, bucket.tokens + 1)


def client_address(host: str | None) -> str:
    """What counts as one client: an IPv4 address, or a network of IPv6, where each client has 2**64 addresses."""
    try:
        address = ipaddress.ip_address(host or "")
    except ValueError:
        return host or "?"
    if isinstance(address, ipaddress.IPv6Address):
        return str(address.ipv4_mapped or ipaddress.ip_network((address, 64), strict=False))
    return str(address)
