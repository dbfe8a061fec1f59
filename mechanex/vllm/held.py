"""What the workers hold, bounded: who sends it keeps count of it, and says what may go."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar
from uuid import uuid4

__all__ = ["HeldUnits", "OwnedUnits"]

_T = TypeVar("_T")


class HeldUnits:
    """Which units the workers hold for one sender: those that requests need, and the latest others.

    Args:
        most_bytes: of the units that the workers hold; what requests need is held beyond it.

    Attributes:
        owner: what the workers know the sender by.
    """

    def __init__(self, most_bytes: int) -> None:
        self.owner = uuid4().hex
        self._most = most_bytes
        self._sizes: OrderedDict[str, int] = OrderedDict()
        self._leases: Counter[str] = Counter()

    def __contains__(self, key: object) -> bool:
        return key in self._sizes

    @contextmanager
    def lease(self, keys: Iterable[str]) -> Iterator[None]:
        """Runs a block in which the workers go on holding these units, once they were sent."""
        leased = tuple(keys)
        self._leases.update(leased)
        for key in leased:
            if key in self._sizes:
                self._sizes.move_to_end(key)
        try:
            yield
        finally:
            self._leases.subtract(leased)
            self._leases += Counter()  # without those that are at 0

    def sent(self, key: str, size: int) -> None:
        """Notes that the workers hold a unit of this many bytes now."""
        self._sizes[key] = size
        self._sizes.move_to_end(key)

    def surplus(self) -> list[str]:
        """The units that the workers are to forget, which count as forgotten from now on."""
        total, found = sum(self._sizes.values()), []
        for key, size in self._sizes.items():
            if total <= self._most:
                break
            if key not in self._leases:
                found.append(key)
                total -= size
        for key in found:
            del self._sizes[key]
        return found


class OwnedUnits(Generic[_T]):
    """What one worker holds: a unit goes with the last of those who sent it.

    Args:
        read: makes of a unit's bytes what is held.
    """

    def __init__(self, read: Callable[[bytes], _T]) -> None:
        self._read = read
        self._units: dict[str, _T] = {}
        self._owners: dict[str, set[str]] = {}

    def add(self, key: str, data: bytes, owner: str) -> None:
        """Holds a unit for an owner."""
        if key not in self._units:
            self._units[key] = self._read(data)
        self._owners.setdefault(key, set()).add(owner)

    def forget(self, keys: Iterable[str], owner: str) -> None:
        """Ends an owner's hold on units; unknown ones are none."""
        for key in keys:
            owners = self._owners.get(key, set())
            owners.discard(owner)
            if not owners:
                self._owners.pop(key, None)
                self._units.pop(key, None)

    def get(self, key: str) -> _T | None:
        """What the unit is; None where nobody sent it."""
        return self._units.get(key)

    def __len__(self) -> int:
        return len(self._units)
