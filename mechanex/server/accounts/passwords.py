"""Passwords: hashed with Argon2id (RFC 9106), and compared in the same time whether there is an account or not."""

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

_ESTIMATED = 72  # characters that are looked at for how they would be guessed: the estimate's own bound
_LEAST_SCORE = 2  # of zxcvbn's 0 to 4: a million guesses


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
        """Whether this is the password; for None, where there is no account, False after the same work.

        A letter with an accent may come as one character or as two, as keyboards have it.
        """
        # Hashes of before this was so are of the characters as they came.
        for text in dict.fromkeys([_bytes(password), password.encode("utf-8", "surrogatepass")]):
            try:
                return self._hasher.verify(stored or self._nobody, text) and stored is not None
            except (VerificationError, InvalidHashError):
                continue
        return False

    def outdated(self, stored: str) -> bool:
        """Whether a stored text was made with other costs than today's."""
        return self._hasher.check_needs_rehash(stored)


def check_password(password: str, email: str) -> None:
    """Refuses a password for a new account, or a new password for one.

    Raises:
        ValidationError: too short, too long, or easy to guess, the address among what is guessed.
    """
    if not SHORTEST_PASSWORD <= len(password) <= LONGEST_PASSWORD:
        raise ValidationError(
            f"a password has {SHORTEST_PASSWORD} to {LONGEST_PASSWORD} characters; this one has {len(password)}."
        )
    text, address = _normal(password).casefold(), email.casefold()
    name = address.partition("@")[0]
    if text in (address, name) or len(set(text)) == 1:
        raise ValidationError("that password is the first to be guessed: choose another one.")
    # Its lists of words take a tenth of a second to load.
    from zxcvbn import zxcvbn

    guessed = zxcvbn(text[:_ESTIMATED], user_inputs=[address, name])
    if guessed["score"] < _LEAST_SCORE:
        advice = " ".join([guessed["feedback"]["warning"], *guessed["feedback"]["suggestions"]]).strip()
        raise ValidationError(f"that password is easy to guess: choose another one. {advice}".strip())


def _normal(password: str) -> str:
    return unicodedata.normalize("NFC", password)


def _bytes(password: str) -> bytes:
    return _normal(password).encode("utf-8", "surrogatepass")
