"""How often one client may ask, and for how many tokens, counted in memory."""

from __future__ import annotations

import ipaddress
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from ...errors import RateLimitError

__all__ = ["TOKEN_HEADERS", "RateLimit", "TokenQuota", "client_address"]

_MOST_KNOWN = 10_000


TOKEN_HEADERS = ("x-ratelimit-limit-tokens", "x-ratelimit-remaining-tokens", "x-ratelimit-reset-tokens")
"""What OpenAI calls the tokens that a sender has a minute, those that are left, and when all will be back."""


class RateLimit:
    """Lets each client ask ``per_minute`` times in a minute that begins with the first; then it is forgotten.

    Any thread may call it.

    Args:
        what: named in the error.
        per_minute: requests.
        clock: seconds.
    """

    def __init__(self, what: str, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._what, self._most, self._clock = what, per_minute, clock
        self._lock = threading.Lock()
        self._minutes: OrderedDict[str, _Minute] = OrderedDict()  # in the order in which they end

    def take(self, client: str) -> None:
        """Counts one request.

        Raises:
            RateLimitError: too many; ``retry_after`` is when the next one may come, in whole seconds.
        """
        with self._lock:
            self._check(client)
            minute = self._minutes.setdefault(client, _Minute(self._clock() + 60))
            minute.taken += 1

    def check(self, client: str) -> None:
        """Raises what ``take`` would, and counts nothing."""
        with self._lock:
            self._check(client)

    def give_back(self, client: str) -> None:
        """Uncounts one request."""
        with self._lock:
            self._forget()
            minute = self._minutes.get(client)
            if minute is not None and minute.taken:  # else its minute is over
                minute.taken -= 1

    def _check(self, client: str) -> None:
        self._forget()
        minute = self._minutes.get(client)
        if minute is None or minute.taken < self._most:
            return
        wait = max(1, math.ceil(minute.end - self._clock()))
        raise RateLimitError(
            f"Too many {self._what}: at most {self._most} a minute. Try again in {wait} s.",
            429,
            retry_after=wait,
        )

    def _forget(self) -> None:
        now = self._clock()
        while self._minutes and next(iter(self._minutes.values())).end <= now:
            self._minutes.popitem(last=False)


@dataclass
class _Minute:
    end: float
    taken: int = 0


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
