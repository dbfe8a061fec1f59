"""One answer of the server while it is written: the engine's row, whose it is, and when it is too late."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from ..engine.decode.row import Row
from .request import Generation

__all__ = ["ServedRow"]


class ServedRow(Row):
    """A request on its way through the model; for the model's thread.

    Args:
        generation: what the answer goes to.
        tokenizer: decodes tokens.
        ends: ids of the tokens that end an answer.
        room: positions that the model's context has, or None.
        deadline: when, on ``time.monotonic()``'s clock, it is too late.
    """

    # As smooth to a reader as more would be, and where steps are short far fewer wake-ups of the event loop.
    pace = 0.02

    def __init__(
        self, generation: Generation, tokenizer: Any, ends: Sequence[int], room: int | None, deadline: float
    ) -> None:
        super().__init__(generation.request, tokenizer, ends, room)
        self.generation, self.deadline = generation, deadline
        self.arrived = time.monotonic()
        self.ended = False  # whether its end was told
