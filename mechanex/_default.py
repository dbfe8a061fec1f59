"""The default client, behind ``mechanex.load``, ``mechanex.steering.generate_vectors`` and the like.

The package says how one is made, so that nothing here and nothing that reads it imports the client.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable
from typing import Any

__all__ = ["attribute", "client", "made_by", "names"]

_make: Callable[[], Any] | None = None
_made: Any = None
_lock = threading.Lock()


def made_by(make: Callable[[], Any]) -> None:
    """Sets what makes the client, once one is asked for."""
    global _make
    _make = make


def client() -> Any:
    """The client, made on first use."""
    global _made
    with _lock:
        if _made is None:
            assert _make is not None
            _made = _make()
        return _made


def attribute(module: str, name: str) -> Any:
    """``mechanex.<module>.<name>`` on the default client; private names are not forwarded.

    Raises:
        AttributeError: the default client's module has no such name.
    """
    if not name.startswith("_"):
        found = getattr(getattr(client(), module), name, None)
        if found is not None:
            return found
    raise AttributeError(f"module 'mechanex.{module}' has no attribute {name!r}")


def names(module: str) -> list[str]:
    """The public names of ``mechanex.<module>``, without making a client."""
    found = importlib.import_module(f".{module}", __package__)
    (kind,) = (getattr(found, name) for name in found.__all__ if name.endswith("Module"))
    return sorted({*found.__all__, *(name for name in dir(kind) if not name.startswith("_"))})
