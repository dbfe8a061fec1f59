"""API keys: made for an account, shown once, and good until they are deleted."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Callable
from dataclasses import dataclass

from sqlalchemy import delete, insert, select

from ...errors import NotFoundError
from ..library.database import Database
from ..library.schema import api_keys, is_id, new_id
from .key_uses import KeyUses

__all__ = ["ApiKey", "ApiKeys", "hash_of"]

_LAST_USED_STEP = 60.0
_KEY_MARK = "mx-"


def hash_of(secret: str) -> str:
    """What is stored of an API key or a refresh token.

    They hold 256 random bits, so nobody can guess their way back from a plain SHA-256; a slow hash, which
    passwords need, would be paid at every request.
    """
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True)
class ApiKey:
    """An API key as it can be listed: ``key`` is its beginning, all that is kept of its text."""

    id: str
    name: str
    key: str
    created_at: float
    last_used: float | None


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

    def account_for(self, key: str) -> str | None:
        """The id of the account whose API key this is, or None."""
        if not key.startswith(_KEY_MARK):
            return None
        hashed = hash_of(key)
        with self._database.read() as connection:
            row = connection.execute(select(api_keys).where(api_keys.c.key_hash == hashed)).first()
        if row is None or not hmac.compare_digest(row.key_hash, hashed):
            return None
        now = self._clock()
        last = self._uses.latest(row.id, row.last_used)
        if last is None or abs(now - last) >= _LAST_USED_STEP:
            self._uses.note(row.id, now)
        return str(row.user_id)

    def create(self, account_id: str, name: str) -> str:
        """Makes an API key and returns it: the only time that its text is known."""
        key = f"{_KEY_MARK}{secrets.token_urlsafe(32)}"
        with self._database.write() as connection:
            connection.execute(
                insert(api_keys).values(
                    id=new_id(),
                    user_id=account_id,
                    name=name,
                    key_hash=hash_of(key),
                    shown=key[:8],
                    created_at=self._clock(),
                )
            )
        return key

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
                row.id, row.name, f"{row.shown}…", row.created_at, self._uses.latest(row.id, row.last_used)
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
