"""From a step's requests to the edits of each of its tokens: rows of slots and strengths. NumPy alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import ValidationError
from .asked import Scope, in_scope

__all__ = ["PlacedEdit", "RequestRead", "StepPlan", "plan_step"]


@dataclass(frozen=True)
class PlacedEdit:
    """An edit of a request, in the table.

    Args:
        slot: its place in the table.
        strength: multiplies it.
        tokens: the tokens that it edits.
    """

    slot: int
    strength: float
    tokens: Scope = None


@dataclass(frozen=True)
class RequestRead:
    """What a step reads of one request.

    Args:
        computed: how many of the request's tokens were read before, so the absolute position of the first one now. A
            request that was preempted begins at 0 again, its own answer among what is read.
        scheduled: how many are read now.
        prompt_length: tokens of the prompt.
        edits: in the order in which they are done to a token.
    """

    computed: int
    scheduled: int
    prompt_length: int
    edits: Sequence[PlacedEdit] = ()


@dataclass(frozen=True)
class StepPlan:
    """The edits of each token of a step.

    Args:
        rows: int32 [T, m], slots in order; -1 for none.
        strength: float32 [T, m].
        slots: those that some token takes.
    """

    rows: NDArray[np.int32]
    strength: NDArray[np.float32]
    slots: frozenset[int]


def plan_step(readings: Sequence[RequestRead], most: int | None = None) -> StepPlan:
    """The plan of a step whose tokens are those of ``readings``, one after another.

    Args:
        readings: the requests in the order of their tokens.
        most: most edits that a token may take; None for any number.

    Returns:
        A plan with as many columns as some token takes edits, one at least.

    Raises:
        ValidationError: a request has more edits than ``most``.
    """
    columns = max((len(one.edits) for one in readings), default=0)
    if most is not None and columns > most:
        raise ValidationError(f"a request has {columns} edits, and there is room for {most} a token.")
    total = sum(one.scheduled for one in readings)
    rows = np.full((total, max(columns, 1)), -1, np.int32)
    strength = np.ones((total, max(columns, 1)), np.float32)
    used = set()
    begin = 0
    for one in readings:
        end = begin + one.scheduled
        # A token that is read alone, as while answers are written, is asked about without an array.
        index = one.computed if one.scheduled == 1 else np.arange(one.computed, one.computed + one.scheduled)
        for column, edit in enumerate(one.edits):
            chosen = True if edit.tokens is None else in_scope(edit.tokens, index, one.prompt_length)
            if chosen is True or np.all(chosen):
                rows[begin:end, column] = edit.slot
            elif np.any(chosen):
                rows[begin:end, column][chosen] = edit.slot
            else:
                continue
            strength[begin:end, column] = edit.strength
            used.add(edit.slot)
        begin = end
    return StepPlan(rows, strength, frozenset(used))
