"""Answers as JSON; large ones are made in a thread that lets the event loop go on."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from anyio.to_thread import run_sync
from fastapi.responses import JSONResponse, Response

__all__ = ["MOST_NUMBERS", "json_answer"]

MOST_NUMBERS = 2**20
"""Numbers of the model's inside in one answer."""

_FEW = 2000  # numbers and texts that are written in less time than handing them to a thread is worth
_encoder = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


async def json_answer(make: Callable[[], Any], size: int | None = None) -> Response:
    """An answer of what ``make`` gives.

    Args:
        make: gives what can be written as JSON; of a large answer it is called in a thread.
        size: about how many numbers and texts there are in it; None where that isn't known, and may be much.
    """
    if size is not None and size <= _FEW:
        return JSONResponse(make())

    def written() -> bytes:
        # Piece by piece: the C encoder would hold Python's lock from the first to the last.
        return b"".join(piece.encode("utf-8", "replace") for piece in _encoder.iterencode(make()))

    return Response(await run_sync(written), media_type="application/json")
