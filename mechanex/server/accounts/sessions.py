"""Sessions: an access token for some minutes, and a refresh token that works once and gives the next pair."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass

from sqlalchemy import ColumnElement, Connection, delete, insert, select, update

from ...errors import AuthenticationError, NotFoundError
from ..library.database import Database
from ..library.schema import is_id, new_id, session_tokens, sessions
from .api_keys import hash_of

__all__ = ["GRACE", "SESSION_ENDED", "OpenSession", "Session", "Sessions", "is_access_token"]

_logger = logging.getLogger(__name__)

GRACE = 30.0
"""Seconds in which a refresh token whose answer was lost may be sent again."""

SESSION_ENDED = "The access token's session has ended: log in again."

_ACCESS_MARK, _REFRESH_MARK = "mxa-", "mxr-"
# Earlier versions gave JWTs, whose claims begin with {"iss":"mechanex", in base64.
_CLAIMS_OF_JWT = ".eyJpc3MiOiJtZWNoYW5leCIs"


@dataclass(frozen=True)
class Session:
    """What a log-in gives: a token for some minutes, and one that gets the next."""

    access_token: str
    refresh_token: str


@dataclass(frozen=True)
class OpenSession:
    """A session as it can be listed: it ends at ``expires_at`` where its refresh token isn't used before."""

    id: str
    created_at: float
    expires_at: float


class Sessions:
    """The sessions of a database; of their tokens only hashes are kept. Methods block; any thread may call them.

    Args:
        database: where they are.
        access_lifetime: seconds that an access token lives.
        refresh_lifetime: seconds that a refresh token lives; using it gives another.
        clock: seconds since 1970.
    """

    def __init__(
        self,
        database: Database,
        access_lifetime: float,
        refresh_lifetime: float,
        clock: Callable[[], float],
    ) -> None:
        self.access_lifetime = access_lifetime
        self._database = database
        self._refresh_lifetime = refresh_lifetime
        self._clock = clock

    def begin(self, connection: Connection, account_id: str) -> Session:
        """A new session of an account, in the transaction of ``connection``."""
        session_id, now = new_id(), self._clock()
        connection.execute(delete(sessions).where(sessions.c.expires_at <= now))
        connection.execute(
            insert(sessions).values(id=session_id, user_id=account_id, created_at=now, expires_at=now)
        )
        return self._next_pair(connection, session_id, now, None)

    def refresh(self, refresh_token: str) -> Session:
        """Exchanges a refresh token for another pair.

        A token works once. One that comes a second time was copied: its whole session ends, for whoever has
        the newer ones too (RFC 9700, section 4.14.2). But an answer may have been lost: for ``GRACE`` seconds after
        its first use, and only as long as no pair that was given for it has been used to go on, a token gives one
        more pair. Of pairs that were given for one token the first that goes on is the session's: where another
        does too, two have the session, and it ends.

        Raises:
            AuthenticationError: unknown, expired, used before, or of a session that has ended.
        """
        now, hashed = self._clock(), hash_of(refresh_token)
        with self._database.write() as connection:
            row = connection.execute(
                select(
                    sessions.c.id,
                    sessions.c.expires_at,
                    sessions.c.revoked_at,
                    session_tokens.c.parent_hash,
                )
                .join(session_tokens, session_tokens.c.session_id == sessions.c.id)
                .where(session_tokens.c.token_hash == hashed)
                .with_for_update()  # of two that come at once one sees what the other has done
            ).first()
            if row is not None and row.revoked_at is None and row.expires_at > now:
                if self._takes(connection, hashed, row.parent_hash, now):
                    return self._next_pair(connection, row.id, now, hashed)
                connection.execute(update(sessions).where(sessions.c.id == row.id).values(revoked_at=now))
                _logger.warning("session %s ended: one of its refresh tokens came back after its use", row.id)
        raise AuthenticationError("The refresh token is not valid, or was used before: log in again.", 401)

    def _takes(self, connection: Connection, hashed: str, parent: str | None, now: float) -> bool:
        """Whether a refresh token may still give a pair; notes its use."""
        used = session_tokens.c.used_at
        first = connection.execute(
            update(session_tokens)
            .where(session_tokens.c.token_hash == hashed, used.is_(None))
            .values(used_at=now)
        )
        if first.rowcount == 1:  # then no other pair that was given for the same token may have gone on
            given_for = parent
        else:
            since = connection.scalar(select(used).where(session_tokens.c.token_hash == hashed))
            if since is None or abs(now - since) > GRACE:
                return False
            given_for = hashed
        went_on = select(session_tokens.c.token_hash).where(
            session_tokens.c.parent_hash == given_for,
            session_tokens.c.token_hash != hashed,
            used.is_not(None),
        )
        return given_for is None or connection.execute(went_on).first() is None

    def all(self, account_id: str) -> list[OpenSession]:
        """The account's sessions that haven't ended, oldest first."""
        wanted = select(sessions.c.id, sessions.c.created_at, sessions.c.expires_at).where(
            sessions.c.user_id == account_id,
            sessions.c.revoked_at.is_(None),
            sessions.c.expires_at > self._clock(),
        )
        with self._database.read() as connection:
            rows = connection.execute(wanted.order_by(sessions.c.created_at, sessions.c.id)).all()
        return [OpenSession(*row) for row in rows]

    def end(self, account_id: str, session_id: str) -> None:
        """Ends a session at once.

        Raises:
            NotFoundError: the account has none with this id, or it has ended.
        """
        if not is_id(session_id) or not self._end(
            sessions.c.id == session_id, sessions.c.user_id == account_id
        ):
            raise NotFoundError(
                f"no session of this account has the id {session_id!r}: GET /auth/sessions lists them."
            )

    def end_of(self, refresh_token: str) -> None:
        """Ends the session of a refresh token, of one that was used too; a text that is none ends none."""
        owner = select(session_tokens.c.session_id).where(
            session_tokens.c.token_hash == hash_of(refresh_token)
        )
        self._end(sessions.c.id.in_(owner))

    def end_all(self, connection: Connection, account_id: str) -> None:
        """Ends all sessions of an account, in the transaction of ``connection``."""
        connection.execute(
            update(sessions)
            .where(sessions.c.user_id == account_id, sessions.c.revoked_at.is_(None))
            .values(revoked_at=self._clock())
        )

    def _end(self, *which: ColumnElement[bool]) -> bool:
        now = self._clock()
        with self._database.write() as connection:
            ended = connection.execute(
                update(sessions).where(*which, sessions.c.revoked_at.is_(None)).values(revoked_at=now)
            )
        return ended.rowcount > 0

    def account_for(self, access_token: str) -> str | None:
        """The id of the account that an access token was given to, or None for a text that is none.

        Raises:
            AuthenticationError: an access token that is expired or revoked.
        """
        if not access_token.startswith(_ACCESS_MARK):
            return None
        with self._database.read() as connection:
            row = connection.execute(
                select(sessions.c.user_id, sessions.c.revoked_at, session_tokens.c.access_expires_at)
                .join(session_tokens, session_tokens.c.session_id == sessions.c.id)
                .where(session_tokens.c.access_hash == hash_of(access_token))
            ).first()
        if row is None:
            return None
        if row.access_expires_at <= self._clock():
            raise AuthenticationError(
                "The access token has expired: get another with POST /auth/refresh, or log in again.", 401
            )
        if row.revoked_at is not None:
            raise AuthenticationError(SESSION_ENDED, 401)
        return str(row.user_id)

    def _next_pair(
        self, connection: Connection, session_id: str, now: float, given_for: str | None
    ) -> Session:
        pair = Session(
            f"{_ACCESS_MARK}{secrets.token_urlsafe(32)}", f"{_REFRESH_MARK}{secrets.token_urlsafe(32)}"
        )
        expires_at = now + self._refresh_lifetime
        # A clock that was wrong for a while and went back must not shorten what was promised.
        connection.execute(
            update(sessions)
            .where(sessions.c.id == session_id, sessions.c.expires_at < expires_at)
            .values(expires_at=expires_at)
        )
        # A session may live for years; what was used a whole lifetime ago needn't be told from nonsense.
        connection.execute(
            delete(session_tokens).where(
                session_tokens.c.session_id == session_id,
                session_tokens.c.used_at <= now - max(self._refresh_lifetime, self.access_lifetime),
            )
        )
        connection.execute(
            insert(session_tokens).values(
                token_hash=hash_of(pair.refresh_token),
                access_hash=hash_of(pair.access_token),
                access_expires_at=now + self.access_lifetime,
                session_id=session_id,
                parent_hash=given_for,
            )
        )
        return pair


def is_access_token(text: str) -> bool:
    """Whether a text has the form of an access token, of this version or an earlier one."""
    return text.startswith(_ACCESS_MARK) or _CLAIMS_OF_JWT in text
