"""Who is let into the batch next, who makes way when the cache is full, and how much memory there is for that."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...engine.capabilities.decoding import token_bytes
from ...engine.memory import free_bytes
from ...engine.models.adapter import ModelAdapter
from ..settings import ServerSettings
from .requests import ServedRow
from .turns import Turns

__all__ = ["Room", "pick", "who_makes_way"]

_AHEAD = 128  # positions beyond a row's present length that are kept free for it when others are let in


def pick(
    waiting: Sequence[ServedRow],
    running: Sequence[ServedRow],
    settings: ServerSettings,
    room: Room,
    most: int,
    n_unread: Callable[[ServedRow], int],
    turns: Turns,
) -> list[ServedRow]:
    """The requests that are read next of those that wait: in turn, and of each sender's in their order.

    As many as fit: into the batch, into the room (one that needs more by itself runs alone), and into one
    pass of ``prefill_tokens``, where rows with the same prompt and edits count once and what was read before doesn't
    count. A prompt whose log-probabilities are wanted is read by itself.

    Args:
        waiting: who waits.
        running: the rows of the batch.
        settings: the limits.
        room: what fits into memory.
        most: rows that the batch may have.
        n_unread: how many tokens of a row are to be read.
        turns: whose turn it is.
    """
    quota = settings.account_running
    held = Counter(row.sender for row in running)
    longest = max(map(_reach, running), default=0)
    picked: list[ServedRow] = []
    prompts: set[object] = set()
    width = 0
    turns.meet(row.sender for row in (*waiting, *running))
    for row in turns.in_turn(waiting, lambda row: row.n_known):
        if len(running) + len(picked) >= most:
            break
        if quota is not None and held[row.sender] >= quota:
            continue
        longest = max(longest, _reach(row))
        n_rows = len(running) + len(picked) + 1
        if n_rows > 1 and longest * n_rows > room.cache_tokens:
            break
        if row.prompt_key not in prompts:
            wider = max(width, n_unread(row))
            alone = any(one.wants_prompt_logprobs for one in (row, *picked[:1]))
            if picked and (alone or wider * (len(prompts) + 1) > settings.prefill_tokens):
                break
            width = wider
        prompts.add(row.prompt_key)
        picked.append(row)
        held[row.sender] += 1
    return picked


def who_makes_way(rows: Sequence[ServedRow], columns: int, room: Room) -> ServedRow | None:
    """The row that came last, where a step of all of them would take more positions than allowed.

    Args:
        rows: the batch's.
        columns: of the cache, before the step.
        room: what fits into memory.
    """
    if len(rows) < 2 or (columns + 1) * len(rows) <= room.cache_tokens:
        return None
    return max(rows, key=lambda row: row.arrived)


def _reach(row: ServedRow) -> int:
    """Positions that a row comes to use soon; all that it may ever use would keep others out for nothing."""
    return min(row.n_known + _AHEAD, row.final_length)


_logger = logging.getLogger(__name__)
_UNKNOWN = 262144  # positions, where it can't be told what one takes
_MOST_PREFIX_BYTES = 2**30


@dataclass(frozen=True)
class Room:
    """What fits into the memory of the model's device.

    Args:
        cache_tokens: most positions that the rows of the batch may hold together, padding included.
        prefix_bytes: most memory of keys and values that are kept of answered requests.
    """

    cache_tokens: int
    prefix_bytes: int

    @classmethod
    def of(cls, adapter: ModelAdapter, settings: ServerSettings) -> Room:
        """As the settings say, and else by the memory that is free now."""
        free, each = free_bytes(adapter.device), token_bytes(adapter)
        prefix_bytes = settings.prefix_bytes
        if prefix_bytes is None:
            prefix_bytes = min(free // 16, _MOST_PREFIX_BYTES)
        tokens = settings.max_cache_tokens
        if tokens is None:
            # The other half is for what a pass needs, and for the moment when a buffer moves to a larger place.
            tokens = _UNKNOWN if each is None else max(1, free // 2 // each)
        _logger.info(
            "room for %d tokens of keys and values (%.2f GiB), and %.2f GiB of what was read before",
            tokens,
            tokens * (each or 0) / 2**30,
            prefix_bytes / 2**30,
        )
        return cls(tokens, prefix_bytes)
