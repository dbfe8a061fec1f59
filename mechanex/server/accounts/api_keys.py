"""API keys: made for an account, shown once, and good for what they may do until they end or are deleted."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sqlalchemy import delete, insert, select

from ...errors import AuthenticationError, NotFoundError
from ..library.database import Database
from ..library.schema import api_keys, is_id, new_id
from .key_uses import KeyUses

__all__ = ["ApiKey", "ApiKeys", "KeyExpiredError", "KeyHolder", "hash_of"]

_LAST_USED_STEP = 60.0
_KEY_MARK = "mx-"
_SHOWN = 8  # characters of a key that are kept


def hash_of(secret: str) -> str:
    """What is stored of an API key or a refresh token.

    They hold 256 random bits, so nobody can guess their way back from a plain SHA-256; a slow hash, which
    passwords need, would be paid at every request.
    """
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True)
class ApiKey:
    """An API key as it can be listed: ``key`` is its beginning, all that is kept of its text.

    ``expires_at`` is None for one that doesn't end, ``scopes`` for one that may do all that a key may.
    """

    id: str
    name: str
    key: str
    created_at: float
    last_used: float | None
    expires_at: float | None = None
    scopes: tuple[str, ...] | None = None


@dataclass(frozen=True)
class KeyHolder:
    """Whose an API key is, and what it may do: None for all that a key may."""

    account_id: str
    scopes: tuple[str, ...] | None


class KeyExpiredError(AuthenticationError):
    """Raised for an API key whose time is over."""


class ApiKeys:
    """The API keys of a database. Methods block, and may be called from any thread.

    Args:
        database: where they are.
        clock: seconds since 1970.
    """

    def __init__(self, database: Database, clock: Callable[[], float]) -> None:
        self._database = database
        self._clock = clock
        self._uses = KeyUses(database)

    def opened_by(self, key: str) -> KeyHolder | None:
        """Whose API key this is and what it may do, or None.

        Raises:
            KeyExpiredError: its time is over.
        """
        if not key.startswith(_KEY_MARK):
            return None
        hashed = hash_of(key)
        with self._database.read() as connection:
            row = connection.execute(select(api_keys).where(api_keys.c.key_hash == hashed)).first()
        if row is None or not hmac.compare_digest(row.key_hash, hashed):
            return None
        now = self._clock()
        if row.expires_at is not None and row.expires_at <= now:
            raise KeyExpiredError("The API key has expired: log in and make another.", 401)
        last = self._uses.latest(row.id, row.last_used)
        if last is None or abs(now - last) >= _LAST_USED_STEP:
            self._uses.note(row.id, now)
        return KeyHolder(str(row.user_id), _scopes(row.scopes))

    def create(
        self,
        account_id: str,
        name: str,
        *,
        scopes: Sequence[str] | None = None,
        lifetime: float | None = None,
    ) -> tuple[str, ApiKey]:
        """Makes an API key.

        Args:
            account_id: whose.
            name: for people.
            scopes: what it may do; None for all that a key may.
            lifetime: seconds until it ends; None for no end.

        Returns:
            Its text, which nobody knows from then on, and the key as it is listed.
        """
        key = f"{_KEY_MARK}{secrets.token_urlsafe(32)}"
        now = self._clock()
        made = ApiKey(
            new_id(),
            name,
            f"{key[:_SHOWN]}…",
            now,
            None,
            None if lifetime is None else now + lifetime,
            None if scopes is None else tuple(dict.fromkeys(scopes)),
        )
        with self._database.write() as connection:
            connection.execute(
                insert(api_keys).values(
                    id=made.id,
                    user_id=account_id,
                    name=name,
                    key_hash=hash_of(key),
                    shown=key[:_SHOWN],
                    created_at=now,
                    expires_at=made.expires_at,
                    scopes=None if made.scopes is None else " ".join(made.scopes),
                )
            )
        return key, made

    def all(self, account_id: str) -> list[ApiKey]:
        """The account's API keys, oldest first."""
        with self._database.read() as connection:
            rows = connection.execute(
                select(api_keys)
                .where(api_keys.c.user_id == account_id)
                .order_by(api_keys.c.created_at, api_keys.c.id)
            ).all()
        return [
            ApiKey(
                row.id,
                row.name,
                f"{row.shown}…",
                row.created_at,
                self._uses.latest(row.id, row.last_used),
                row.expires_at,
                _scopes(row.scopes),
            )
            for row in rows
        ]

    def delete(self, account_id: str, key_id: str) -> None:
        """Ends an API key at once.

        Raises:
            NotFoundError: the account has none with this id.
        """
        gone = 0
        if is_id(key_id):
            with self._database.write() as connection:
                gone = connection.execute(
                    delete(api_keys).where(api_keys.c.id == key_id, api_keys.c.user_id == account_id)
                ).rowcount
        if gone != 1:
            raise NotFoundError(
                f"no API key of this account has the id {key_id!r}: GET /auth/api-keys lists them."
            )

    def close(self) -> None:
        """Notes the last uses, if that can be done soon."""
        self._uses.close()


def _scopes(kept: str | None) -> tuple[str, ...] | None:
    return None if kept is None else tuple(kept.split())
