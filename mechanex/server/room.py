"""How much memory the answers that are being written may take."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from ..engine.capabilities.decoding import token_bytes
from ..engine.memory import free_bytes
from ..engine.models.adapter import ModelAdapter
from .settings import Settings

__all__ = ["Room"]

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
    def of(cls, adapter: ModelAdapter, settings: Settings) -> Room:
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
