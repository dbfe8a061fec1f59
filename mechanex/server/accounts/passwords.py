"""Passwords: which may be one, hashed with Argon2id (RFC 9106), and compared in one time with an account or without."""

from __future__ import annotations

import secrets
import unicodedata

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError

from ...errors import ValidationError

__all__ = ["LONGEST_PASSWORD", "SHORTEST_PASSWORD", "Passwords", "check_password"]

SHORTEST_PASSWORD = 8
LONGEST_PASSWORD = 1024
"""Characters; more would only let a stranger keep the hash function busy."""

_LEAST_SCORE = 2  # of zxcvbn, from 0 to 4: a million guesses
_ESTIMATED = 72  # characters; zxcvbn takes no more


def check_password(password: str, email: str) -> None:
    """Refuses what somebody would guess: by its length, its likeness to the address, or zxcvbn's estimate.

    Args:
        password: a new one.
        email: the address of its account.

    Raises:
        ValidationError: says why; the password isn't in it.
    """
    text = unicodedata.normalize("NFC", password)
    if not SHORTEST_PASSWORD <= len(text) <= LONGEST_PASSWORD:
        raise ValidationError(
            f"a password has {SHORTEST_PASSWORD} to {LONGEST_PASSWORD} characters; this one has {len(text)}."
        )
    name, _, domain = email.casefold().partition("@")
    if text.strip().casefold() in (email.casefold(), name, domain):
        raise ValidationError("this password is the email address or a part of it: choose another.")
    if len(set(text)) == 1:
        raise ValidationError("this password is one character again and again: choose another.")
    from zxcvbn import zxcvbn  # reads its lists of words

    estimate = zxcvbn(text[:_ESTIMATED], user_inputs=[email, name, domain], max_length=_ESTIMATED)
    if estimate["score"] < _LEAST_SCORE:
        advice = " ".join(
            filter(None, [estimate["feedback"]["warning"], *estimate["feedback"]["suggestions"]])
        )
        raise ValidationError(f"this password is guessed in less than a million tries. {advice}".rstrip())


class Passwords:
    """Hashes and checks passwords; each takes about 64 MiB and 0.1 s, on purpose.

    A password is its text in Unicode's composed form (NFC), whatever keyboard it was typed on.

    Args:
        hasher: its costs; by default argon2-cffi's, the second recommendation of RFC 9106.
    """

    def __init__(self, hasher: PasswordHasher | None = None) -> None:
        self._hasher = hasher or PasswordHasher()
        self._nobody = self._hasher.hash(secrets.token_hex(16))

    def hash(self, password: str) -> str:
        """The text to store, salt and costs included."""
        return self._hasher.hash(_bytes(unicodedata.normalize("NFC", password)))

    def verify(self, stored: str | None, password: str) -> bool:
        """Whether this is the password; for None, where there is no account, False after the same work."""
        # Earlier versions hashed what was typed: tried for everybody, so that the time tells of no account.
        forms = dict.fromkeys((unicodedata.normalize("NFC", password), password))
        return any([self._matches(stored or self._nobody, form) for form in forms]) and stored is not None

    def outdated(self, stored: str) -> bool:
        """Whether a stored text was made with other costs than today's."""
        return self._hasher.check_needs_rehash(stored)

    def _matches(self, stored: str, text: str) -> bool:
        try:
            return self._hasher.verify(stored, _bytes(text))
        except (VerificationError, InvalidHashError):
            return False


def _bytes(password: str) -> bytes:
    return password.encode("utf-8", "surrogatepass")
