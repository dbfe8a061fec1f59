"""Who has which place in the table of edits: counted by requests, freed with the last."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable

from ..errors import ValidationError

__all__ = ["Slots"]


class Slots:
    """Places for edits by their keys; requests with the same edits share one, whatever their strengths.

    A place stays with its edits when the last request goes, until another needs it: who comes back finds it filled.

    Args:
        n_slots: how many places there are.
    """

    def __init__(self, n_slots: int) -> None:
        if n_slots < 1:
            raise ValidationError(f"a table of edits has one slot or more; got {n_slots}.")
        self.n_slots = n_slots
        self._free = list(range(n_slots - 1, -1, -1))
        self._idle: OrderedDict[str, int] = OrderedDict()
        self._taken: dict[str, int] = {}
        self._holders: Counter[str] = Counter()
        self._held: dict[str, tuple[str, ...]] = {}

    def fits(self, keys: Iterable[str]) -> bool:
        """Whether a request with these edits would find a place for each."""
        missing = sum(key not in self._taken for key in set(keys))
        return missing <= self.n_slots - len(self._taken)

    def acquire(self, request_id: str, keys: Iterable[str]) -> dict[str, int]:
        """Gives a request its places, for edits that it may hold already.

        Returns:
            Of its keys, those whose place has to be filled, with the place.

        Raises:
            ValidationError: there are not enough; then nothing has changed.
        """
        if request_id in self._held:
            return {}
        wanted = tuple(dict.fromkeys(keys))
        if not self.fits(wanted):
            raise ValidationError(
                f"request {request_id} needs room for {len(wanted)} edits, and {len(self._taken)} of the "
                f"{self.n_slots} slots are taken: let requests wait, or start with more slots."
            )
        # What is idle and wanted is taken before anything that is idle makes way.
        for key in wanted:
            if key in self._idle:
                self._taken[key] = self._idle.pop(key)
        filled = {}
        for key in wanted:
            if key not in self._taken:
                slot = self._free.pop() if self._free else self._idle.popitem(last=False)[1]
                self._taken[key] = filled[key] = slot
            self._holders[key] += 1
        self._held[request_id] = wanted
        return filled

    def release(self, request_id: str) -> None:
        """Takes a request's places back; unknown requests are none."""
        for key in self._held.pop(request_id, ()):
            self._holders[key] -= 1
            if not self._holders[key]:
                del self._holders[key]
                self._idle[key] = self._taken.pop(key)

    def slot(self, key: str) -> int:
        """The place of edits that some request holds."""
        return self._taken[key]

    @property
    def holders(self) -> tuple[str, ...]:
        """The requests that hold places."""
        return tuple(self._held)
