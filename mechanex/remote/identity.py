"""The secrets that a client sends, and what can be one; nothing here shows them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TypeGuard

from ..errors import ValidationError

__all__ = ["NAMES", "Credentials", "Tokens", "checked", "is_token"]

_MOST_CHARACTERS = 8192


@dataclass(frozen=True, repr=False)
class Credentials:
    """What is sent with a call; its ``repr`` tells what is there, never what it is.

    Attributes:
        api_key: sent as ``x-api-key``.
        access_token: sent as ``Authorization: Bearer``.
        refresh_token: buys a new access token.
    """

    api_key: str | None = None
    access_token: str | None = None
    refresh_token: str | None = None

    def __bool__(self) -> bool:
        return self.api_key is not None or self.access_token is not None

    def __repr__(self) -> str:
        there = ", ".join(name for name in NAMES if getattr(self, name) is not None)
        return f"<Credentials: {there or 'none'}>"

    def secrets(self) -> tuple[str, ...]:
        """The texts that must not be shown anywhere."""
        return tuple(text for name in NAMES if (text := getattr(self, name)) is not None)


NAMES = tuple(field.name for field in fields(Credentials))


@dataclass(frozen=True, repr=False)
class Tokens:
    """The tokens of a log-in; the server may give no refresh token."""

    access_token: str
    refresh_token: str | None = None


def is_token(text: object) -> TypeGuard[str]:
    """Whether a header can hold it: printable ASCII without spaces, not empty, not endless."""
    return (
        isinstance(text, str)
        and 0 < len(text) <= _MOST_CHARACTERS
        and text.isascii()
        and text.isprintable()
        and " " not in text
    )


def checked(text: object, name: str) -> str:
    """The text without spaces around it, if it can be a key or token; it is never shown.

    Raises:
        ValidationError: it can't.
    """
    found = text.strip() if isinstance(text, str) else text
    if not is_token(found):
        raise ValidationError(
            f"{name} is no key or token (it isn't shown here): a text of printable ASCII characters without "
            f"spaces, at most {_MOST_CHARACTERS:,}; check that it was copied whole."
        )
    return found
