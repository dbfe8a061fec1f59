"""Strengths that change along a text: by a list, or by a function of the place."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakValueDictionary

import numpy

from ..errors import ValidationError
from .intervention import Edit

__all__ = ["Schedule", "Varying"]


class Schedule:
    """What multiplies the strength at each token.

    Places count from the token that the answer's first one is chosen from, the prompt's last: at place i the answer's
    token i is chosen; places below 0 are the prompt's.

    Args:
        values: strengths of places 0, 1, 2, …, the last of which goes on, or a function from the place to one.
        prompt: the strength of places below 0; None for that of place 0, or with a function for what it gives.

    Raises:
        ValidationError: no values, or one that is not a finite number.
    """

    def __init__(
        self, values: Sequence[float] | Callable[[int], float], *, prompt: float | None = None
    ) -> None:
        self.function: Callable[[int], float] | None = None
        self.values: tuple[float, ...] = ()
        if callable(values):
            self.function = values
        else:
            self.values = tuple(_finite(value) for value in values)
            if not self.values:
                raise ValidationError("A schedule needs one strength or more; got an empty list.")
        self.prompt = None if prompt is None else _finite(prompt)

    def at(self, place: int) -> float:
        """The strength at a place."""
        if place < 0 and self.prompt is not None:
            return self.prompt
        if self.function is not None:
            return _finite(self.function(place))
        return self.values[min(max(place, 0), len(self.values) - 1)]

    def said(self) -> dict[str, Any]:
        """It as JSON has it.

        Raises:
            ValidationError: a function, which can't be written down.
        """
        if self.function is not None:
            raise ValidationError(
                "A schedule that is a function can't be saved: give its strengths as a list."
            )
        return {"values": list(self.values), "prompt": self.prompt}

    def __repr__(self) -> str:
        values = list(self.values) if self.function is None else self.function
        return f"Schedule({values!r}, prompt={self.prompt!r})"


class Varying:
    """The edits of a schedule, one for each strength; the same strength gives the same edit while somebody has it.

    Args:
        schedule: strengths by place.
        make: an edit of a strength; not called for 0, which edits nothing. It can be pickled where this is to be.
    """

    def __init__(self, schedule: Schedule, make: Callable[[float], Edit]) -> None:
        self.schedule, self._make = schedule, make
        self._edits: WeakValueDictionary[float, Edit] = WeakValueDictionary()

    def __reduce__(self) -> tuple[Any, ...]:
        if self.schedule.function is not None:
            raise ValidationError("A schedule that is a function can't be sent to another process.")
        return Varying, (self.schedule, self._make)

    def made(self, strength: float) -> Edit:
        """The edit of a strength other than 0."""
        return self._make(strength)

    def edit(self, place: int) -> Edit | None:
        """The edit at a place, or None where nothing is edited."""
        strength = self.schedule.at(place)
        if strength == 0:
            return None
        found = self._edits.get(strength)
        if found is None:
            found = self._edits[strength] = self.made(strength)
        return found

    def spread(self, places: Any, reached: Any) -> list[tuple[Edit, Any]]:
        """The edits that reach some tokens, each with the tokens that it reaches.

        Args:
            places: int array [n_tokens].
            reached: bool array [n_tokens], the tokens that are edited at all.

        Returns:
            Edits with bool arrays [n_tokens]; no token is in two of them.
        """
        found: dict[int, tuple[Edit, list[int]]] = {}
        for at in numpy.flatnonzero(reached).tolist():
            edit = self.edit(int(places[at]))
            if edit is not None:
                found.setdefault(id(edit), (edit, []))[1].append(at)
        spread = []
        for edit, tokens in found.values():
            mask = numpy.zeros(len(places), dtype=bool)
            mask[tokens] = True
            spread.append((edit, mask))
        return spread


def _finite(value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool) or not math.isfinite(number):
        raise ValidationError(f"A schedule's strengths are finite numbers; got {value!r}.")
    return number
