"""Which credentials in the file are a server's: one server's at the top level, those of others beside them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import ValidationError
from .address import PUBLIC_BACKEND, origin_of
from .identity import NAMES

__all__ = ["ENTRY", "normal", "with_entry"]

ENTRY = (*NAMES, "email", "previous_api_key")
"""What a server's entry may hold."""


def with_entry(found: dict[str, Any], origin: str, changes: Mapping[str, str | None]) -> dict[str, Any]:
    """The file's fields with this server's on top, changed; another server's move to ``others``."""
    belongs = _key(found.get("base_url") or PUBLIC_BACKEND)
    if belongs != origin:
        top = {name: found.pop(name) for name in ENTRY if name in found}
        others = found["others"] if isinstance(found.get("others"), dict) else {}
        others = {_key(name): entry for name, entry in others.items()}
        if top:
            others[belongs] = top
        entry = others.pop(origin, None)
        found = {**found, **(entry if isinstance(entry, dict) else {}), "others": others or None}
    found = {**found, **changes, "base_url": origin}
    return {name: value for name, value in found.items() if value is not None}


def normal(base_url: object) -> str | None:
    """The form that origins are compared in; None for what is no URL."""
    try:
        return origin_of(base_url) if isinstance(base_url, str) else None
    except ValidationError:
        return None


def _key(base_url: object) -> str:
    """What a server's entry is kept under; one that can't be read stays under its own name."""
    return normal(base_url) or str(base_url)
