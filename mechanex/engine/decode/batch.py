"""The rows of a batch as calls of the model step them: the cache that they share, and the inputs of the next step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from ..models.adapter import ModelAdapter
from .cache import RollingCache
from .calls import CallForm, Calls, Carried
from .reading import Reading
from .row import Row
from .steering import RowSteering, Span
from .stepping import Stepping

__all__ = ["Batch", "CalledBatch"]


class Batch(Protocol):
    """Rows that are stepped together, in order; the last one takes the place of one that leaves.

    Attributes:
        columns: of the cache: tokens of its longest row.
        kept: the cache that the rows share, by the name of the model's argument; None without rows.
    """

    columns: int
    kept: Carried | None

    def admit(self, rows: Sequence[Row], reading: Reading, places: Sequence[int]) -> None:
        """Adds rows that were read to the end.

        Args:
            rows: the new ones.
            reading: what read them.
            places: of their prompts in it.
        """

    def step(self, rows: Sequence[Row], unread: Tensor | None, latest: Tensor | None) -> Tensor:
        """[rows, vocabulary] logits of each row's next token; the device isn't waited for.

        Args:
            rows: all of the batch.
            unread: [rows] their newest tokens where the rows don't have them yet, or None.
            latest: [rows] what the last step chose where that was of the same rows, or None.
        """

    def leave(self, place: int) -> None:
        """Takes the row at this place out."""

    def trim(self, longest: int) -> None:
        """Says that no row has more tokens than this."""

    def clear(self) -> None:
        """Takes all rows out."""

    def detach(self) -> None:
        """Leaves the model as it was; the next step attaches again."""


class CalledBatch:
    """A batch whose every step is a call of the model with whatever the call before gave back.

    Args:
        adapter: the model.
        form: how it takes its calls.
        calls: makes them.
        steering: edits them.
    """

    def __init__(self, adapter: ModelAdapter, form: CallForm, calls: Calls, steering: RowSteering) -> None:
        self._device, self._form = adapter.device, form
        self._calls, self._steering = calls, steering
        self.columns = 0
        self.kept: Carried | None = None
        self._changes = 0
        self._stepping: Stepping | None = None  # of the present rows

    def admit(self, rows: Sequence[Row], reading: Reading, places: Sequence[int]) -> None:
        """As in :class:`Batch`."""
        assert reading.kept is not None
        longest = max(row.length for row in rows)
        columns = max(self.columns, longest)
        if self._form == "rolling":
            ((name, source),) = reading.kept.items()
            if self.kept is None:
                self.kept = {name: RollingCache(source)}
            everyone = list(places) == list(range(len(reading.prompts)))
            self.kept[name].admit(source, columns, None if everyone else places, longest)
        else:
            assert self.kept is None and len(rows) == 1
            self.kept = reading.kept
        self.columns = columns
        self._changed()

    def step(self, rows: Sequence[Row], unread: Tensor | None, latest: Tensor | None) -> Tensor:
        """As in :class:`Batch`."""
        if self._stepping is None:
            self._stepping = Stepping(rows, self.columns, self._device, unread)
        else:
            assert latest is not None
            self._stepping.advance(latest)
        if not self._steering.recall(self._changes):
            ahead = int(unread is not None)
            spans = [
                Span(row.steering, len(row.ids), row.length + ahead, row.request.onlooker) for row in rows
            ]
            self._steering.prepare(spans, 1, self._changes)
        try:
            logits, self.kept = self._calls(self._stepping.inputs(), self.kept, 1)
        finally:
            self._steering.rest()
        self.columns += 1
        return logits[:, -1]

    def leave(self, place: int) -> None:
        """As in :class:`Batch`."""
        assert self.kept is not None
        for cache in self.kept.values():
            cache.drop(place)
        self._changed()

    def trim(self, longest: int) -> None:
        """As in :class:`Batch`."""
        if longest < self.columns and self.kept is not None:
            for cache in self.kept.values():
                cache.trim(longest)
            self.columns = longest

    def clear(self) -> None:
        """As in :class:`Batch`."""
        self.kept, self.columns = None, 0
        self._changed()

    def detach(self) -> None:
        """As in :class:`Batch`."""

    def _changed(self) -> None:
        self._changes += 1
        self._stepping = None
