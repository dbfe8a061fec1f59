"""Whose turn it is: those who share a server get as much of it each, however many requests each of them sends."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Protocol, TypeVar

from .requests import ServedRow

__all__ = ["Turns"]


class _Sent(Protocol):
    @property
    def sender(self) -> Hashable: ...


S = TypeVar("S", bound=_Sent)


class Turns:
    """Counts what each sender was served, in tokens or seconds, while others wait beside it (arXiv:2401.00588).

    A sender is an account, or an address without one. Who comes anew begins at the least count of those who are there,
    so that nobody saves up turns by staying away.
    """

    def __init__(self) -> None:
        self._served: dict[Hashable, float] = {}

    def note(self, sender: Hashable, amount: float) -> None:
        """Counts what a sender was served."""
        self._served[sender] = self._served.get(sender, 0.0) + amount

    def meet(self, present: Iterable[Hashable]) -> None:
        """Says who waits or is answered now; others are forgotten."""
        senders = set(present)
        known = {sender: n for sender, n in self._served.items() if sender in senders}
        least = min(known.values(), default=0.0)
        # Counts stay small, and so exact.
        self._served = {sender: known.get(sender, least) - least for sender in senders}

    def served(self, sender: Hashable) -> float:
        """What a sender was served."""
        return self._served.get(sender, 0.0)

    def in_turn(self, waiting: Iterable[S], cost: Callable[[S], float]) -> Iterator[S]:
        """What waits: each time the first of the sender that was served least, if those before are taken.

        Args:
            waiting: in the order in which they came.
            cost: what taking one serves its sender.
        """
        queues: dict[Hashable, deque[S]] = {}
        for one in waiting:
            queues.setdefault(one.sender, deque()).append(one)
        ahead = {sender: self.served(sender) for sender in queues}
        while queues:
            sender = min(queues, key=ahead.__getitem__)  # of equals the one that came first
            one = queues[sender].popleft()
            if not queues[sender]:
                del queues[sender]
            else:
                ahead[sender] += cost(one)
            yield one

    def who_makes_way(self, waiting: Sequence[ServedRow], running: Sequence[ServedRow]) -> ServedRow | None:
        """The row that gives its place to a sender who has none: the latest of whoever has most and was served more.

        Args:
            waiting: who waits.
            running: the batch.
        """
        held: dict[Hashable, list[ServedRow]] = {}
        for row in running:
            held.setdefault(row.sender, []).append(row)
        without = [row.sender for row in waiting if row.sender not in held and not row.generation.cancelled]
        if not without or not held:
            return None
        least = min(map(self.served, without))
        most = max(held, key=lambda sender: (len(held[sender]), self.served(sender)))
        if len(held[most]) < 2 or self.served(most) <= least:
            return None
        return max(held[most], key=lambda row: row.arrived)
