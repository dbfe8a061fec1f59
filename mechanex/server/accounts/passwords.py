"""Passwords: hashed with Argon2id (RFC 9106), and compared in the same time whether there is an account or not."""

from __future__ import annotations

import secrets

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError

__all__ = ["LONGEST_PASSWORD", "SHORTEST_PASSWORD", "Passwords"]

SHORTEST_PASSWORD = 8
LONGEST_PASSWORD = 1024
"""Characters; more would only let a stranger keep the hash function busy."""


class Passwords:
    """Hashes and checks passwords; each takes about 64 MiB and 0.1 s, on purpose.

    Args:
        hasher: its costs; by default argon2-cffi's, the second recommendation of RFC 9106.
    """

    def __init__(self, hasher: PasswordHasher | None = None) -> None:
        self._hasher = hasher or PasswordHasher()
        self._nobody = self._hasher.hash(secrets.token_hex(16))

    def hash(self, password: str) -> str:
        """The text to store, salt and costs included."""
        return self._hasher.hash(_bytes(password))

    def verify(self, stored: str | None, password: str) -> bool:
        """Whether this is the password; for None, where there is no account, False after the same work."""
        try:
            return self._hasher.verify(stored or self._nobody, _bytes(password)) and stored is not None
        except (VerificationError, InvalidHashError):
            return False

    def outdated(self, stored: str) -> bool:
        """Whether a stored text was made with other costs than today's."""
        return self._hasher.check_needs_rehash(stored)


def _bytes(password: str) -> bytes:
    return password.encode("utf-8", "surrogatepass")
