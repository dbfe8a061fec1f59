"""Who shares a server with whom: each account is one sender, and each address that sends without one."""

from __future__ import annotations

from contextvars import ContextVar

__all__ = ["sender", "sent_by"]

_sender: ContextVar[str] = ContextVar("mechanex_sender", default="")


def sent_by(name: str) -> None:
    """Says who sent the request that is handled from here on: an account's id, or an address."""
    _sender.set(name)


def sender() -> str:
    """Who sent the request that is being handled; an empty text where nobody said so."""
    return _sender.get()
