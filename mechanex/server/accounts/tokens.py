"""Access tokens: JWTs that say for a few minutes which account and which session they belong to."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import jwt

from ...errors import AuthenticationError, ValidationError

__all__ = ["SECRET_VARIABLE", "AccessTokens", "Claims", "signing_secret"]

SECRET_VARIABLE = "MECHANEX_SERVER_SECRET"

_ALGORITHM = "HS256"
_ISSUER = "mechanex"
_SHORTEST = 32


@dataclass(frozen=True)
class Claims:
    """What a token says: the account and the session."""

    account_id: str
    session_id: str


class AccessTokens:
    """Makes and reads access tokens.

    Args:
        secret: what they are signed with.
        lifetime: seconds.
        clock: seconds since 1970.
    """

    def __init__(self, secret: bytes, lifetime: float, clock: Callable[[], float]) -> None:
        self._secret = secret
        self.lifetime = lifetime
        self._clock = clock

    def issue(self, claims: Claims) -> str:
        """A token of this moment."""
        now = self._clock()
        payload = {
            "iss": _ISSUER,
            "sub": claims.account_id,
            "sid": claims.session_id,
            "iat": int(now),
            "exp": now + self.lifetime,
        }
        return jwt.encode(payload, self._secret, algorithm=_ALGORITHM)

    def read(self, token: str) -> Claims | None:
        """What a token says, or None for a text that this server didn't sign.

        Raises:
            AuthenticationError: its time is over.
        """
        try:
            payload = jwt.decode(
                token,
                self._secret,
                algorithms=[_ALGORITHM],
                issuer=_ISSUER,
                options={"require": ["exp", "sub", "sid"], "verify_exp": False, "verify_iat": False},
            )
            expires, claims = float(payload["exp"]), Claims(str(payload["sub"]), str(payload["sid"]))
        except (jwt.InvalidTokenError, ValueError, TypeError):
            return None
        if expires <= self._clock():
            raise AuthenticationError(
                "The access token has expired: get another with POST /auth/refresh, or log in again.", 401
            )
        return claims


def signing_secret(folder: Path, environ: Mapping[str, str] | None = None) -> bytes:
    """The secret of the access tokens: ``MECHANEX_SERVER_SECRET``, or one made once and kept in ``folder``.

    It isn't kept in the database, so that a copy of the database opens nothing.

    Raises:
        ValidationError: a secret that is too short.
        OSError: the file can't be read or made.
    """
    chosen = (os.environ if environ is None else environ).get(SECRET_VARIABLE)
    if chosen:
        if len(chosen) < _SHORTEST:
            raise ValidationError(
                f"{SECRET_VARIABLE} has {len(chosen)} characters and needs {_SHORTEST}: take one from "
                "python -c 'import secrets; print(secrets.token_urlsafe(48))'."
            )
        return chosen.encode()
    path = folder / "secret"
    if not path.exists():
        _write_once(path, secrets.token_urlsafe(48))
    secret = path.read_text(encoding="ascii", errors="replace").strip()
    if len(secret) < _SHORTEST or not secret.isascii():
        raise ValidationError(
            f"{path} holds no signing secret: delete it (everyone logs in again), and restart."
        )
    return secret.encode()


def _write_once(path: Path, text: str) -> None:
    """Makes a whole file that only its owner can read; one that another process has made meanwhile stays."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
