"""What the modules of a client share, and how a module's name stands for the default client's module."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .client import Mechanex

__all__ = ["default_attribute"]


class _BaseModule:
    """A base class for API modules: holds the client, whose model and stored vectors they use.

    Args:
        client: the main client instance.
    """

    def __init__(self, client: Mechanex) -> None:
        self._client = client


def default_attribute(module: str, name: str) -> Any:
    """``mechanex.<module>.<name>`` on the default client; private names are not forwarded.

    Raises:
        AttributeError: the default client's module has no such name.
    """
    if not name.startswith("_"):
        from .client import default_client

        found = getattr(getattr(default_client(), module), name, None)
        if found is not None:
            return found
    raise AttributeError(f"module 'mechanex.{module}' has no attribute {name!r}")
