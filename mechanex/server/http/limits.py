"""How often one client may ask, and for how many tokens, counted in memory."""

from __future__ import annotations

import ipaddress
import math
import threading
import time
from collections.abc import Callable

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import FixedWindowRateLimiter

from ...errors import RateLimitError

__all__ = ["TOKEN_HEADERS", "RateLimit", "TokenQuota", "client_address"]

_MOST_KNOWN = 10_000


TOKEN_HEADERS = ("x-ratelimit-limit-tokens", "x-ratelimit-remaining-tokens", "x-ratelimit-reset-tokens")
"""What OpenAI calls the tokens that a sender has a minute, those that are left, and when all will be back."""


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


class TokenQuota:
    """So many tokens a minute for each sender, who gets them back evenly; any thread may call it.

    How many tokens an answer has is known when it has ended, so what runs may use more than is left: then its sender
    waits until that has come back.

    Args:
        per_minute: tokens of prompts and answers.
        clock: seconds.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._most, self._clock = per_minute, clock
        self._lock = threading.Lock()
        self._left: dict[str, tuple[float, float]] = {}  # tokens, and when that was so

    def check(self, sender: str) -> None:
        """Lets a sender ask who has tokens left.

        Raises:
            RateLimitError: none are; ``retry_after`` is when there will be one, in whole seconds.
        """
        with self._lock:
            left = self._now(sender)
        if left < 1:
            wait = math.ceil((1 - left) * 60 / self._most)
            raise RateLimitError(
                f"The {self._most} tokens that this account has in a minute are used up. Try again in {wait} s.",
                429,
                retry_after=wait,
            )

    def spend(self, sender: str, tokens: int) -> None:
        """Counts tokens of a prompt or an answer."""
        with self._lock:
            self._left[sender] = (self._now(sender) - tokens, self._clock())
            if len(self._left) > _MOST_KNOWN:
                self._left = {
                    one: kept for one, kept in self._left.items() if self._filled(kept) < self._most
                }

    def headers(self, sender: str) -> dict[str, str]:
        """What a sender has left, as OpenAI's headers tell it; ``reset`` is when all of it has come back."""
        with self._lock:
            left = self._now(sender)
        back = f"{math.ceil((self._most - left) * 60 / self._most)}s"
        return dict(zip(TOKEN_HEADERS, (str(self._most), str(max(0, int(left))), back), strict=True))

    def _now(self, sender: str) -> float:
        known = self._left.get(sender)
        return self._most if known is None else self._filled(known)

    def _filled(self, known: tuple[float, float]) -> float:
        left, at = known
        return min(self._most, left + (self._clock() - at) * self._most / 60)


def client_address(host: str | None) -> str:
    """What counts as one client: an IPv4 address, or a network of IPv6, where each client has 2**64 addresses."""
    try:
        address = ipaddress.ip_address(host or "")
    except ValueError:
        return host or "?"
    if isinstance(address, ipaddress.IPv6Address):
        return str(address.ipv4_mapped or ipaddress.ip_network((address, 64), strict=False))
    return str(address)
