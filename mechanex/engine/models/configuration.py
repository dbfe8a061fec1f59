"""What a transformers configuration says of a model's texts, wherever its version and family put it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["context_of", "rotary_tables", "text_config"]

_ROTARY = ("rope_parameters", "rope_scaling")
# Kinds of layers that see the last tokens only: the distances that they turn into angles don't grow with the text.
_LOCAL = ("sliding_attention", "chunked_attention")


def text_config(config: Any) -> Any:
    """The part of a configuration that is about text; one of a model of text alone as it is."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def rotary_tables(config: Any) -> Iterator[tuple[str | None, Mapping[str, Any]]]:
    """The sets of rotary parameters of a text configuration, each with the kind of layers that it is for; None: all."""
    for name in _ROTARY:
        found = getattr(config, name, None)
        if not isinstance(found, Mapping):
            continue
        nested = [(kind, table) for kind, table in found.items() if isinstance(table, Mapping)]
        yield from nested or [(None, found)]


def context_of(config: Any) -> int | None:
    """Tokens that a text may have by a text configuration; None where it names no limit.

    Rotary factors of the kind "dynamic" stretch with a text that outgrows the limit, and are made to do so up to their
    factor. Of layers of several kinds, those that see the whole text decide.
    """
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit <= 0:
        return None
    tables = list(rotary_tables(config))
    whole = [table for kind, table in tables if kind not in _LOCAL] or [table for _, table in tables]
    return int(limit * max(1.0, min(map(_stretch, whole), default=1.0)))


def _stretch(table: Mapping[str, Any]) -> float:
    dynamic = table.get("rope_type", table.get("type")) == "dynamic"
    return float(table.get("factor") or 1.0) if dynamic else 1.0
