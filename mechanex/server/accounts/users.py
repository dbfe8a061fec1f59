"""Accounts: sign-up, log-in, and sessions with rotating refresh tokens."""

from __future__ import annotations

import logging
import re
import secrets
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass

from sqlalchemy import Connection, delete, insert, select, update
from sqlalchemy.exc import IntegrityError

from ...errors import AuthenticationError, NotFoundError, ValidationError
from ..library.database import Database
from ..library.schema import SHARED_ACCOUNT, new_id, refresh_tokens, sessions, users
from .api_keys import hash_of
from .passwords import LONGEST_PASSWORD, SHORTEST_PASSWORD, Passwords
from .tokens import AccessTokens, Claims

__all__ = ["Account", "Accounts", "Session", "normalized"]

_logger = logging.getLogger(__name__)

_EMAIL = re.compile(r"[^\s@]{1,64}@[^\s@.]+(\.[^\s@.]+)*")


@dataclass(frozen=True)
class Account:
    """Who signed up; ``model_name`` is what ``set_model`` chose."""

    id: str
    email: str | None
    model_name: str | None
    created_at: float


@dataclass(frozen=True)
class Session:
    """What a log-in gives: a token for some minutes, and one that gets the next."""

    access_token: str
    refresh_token: str


class Accounts:
    """The accounts of a database. Methods block, and may be called from any thread.

    Args:
        database: where they are.
        passwords: hashes passwords.
        tokens: makes access tokens.
        refresh_lifetime: seconds that a refresh token lives; using it gives another.
        clock: seconds since 1970.
    """

    def __init__(
        self,
        database: Database,
        passwords: Passwords,
        tokens: AccessTokens,
        refresh_lifetime: float,
        clock: Callable[[], float],
    ) -> None:
        self._database = database
        self._passwords = passwords
        self._tokens = tokens
        self._refresh_lifetime = refresh_lifetime
        self._clock = clock

    @property
    def access_lifetime(self) -> float:
        """Seconds that an access token lives."""
        return self._tokens.lifetime

    def sign_up(self, email: str, password: str) -> tuple[Account, Session]:
        """Makes an account and logs it in.

        Raises:
            ValidationError: no email address, one that has an account, or a password too short or too long.
        """
        address = normalized(email)
        if not _is_address(address):
            raise ValidationError(f"{email[:100]!r} is no email address: write name@example.org.")
        if not SHORTEST_PASSWORD <= len(password) <= LONGEST_PASSWORD:
            raise ValidationError(
                f"a password has {SHORTEST_PASSWORD} to {LONGEST_PASSWORD} characters; this one has {len(password)}."
            )
        account = Account(new_id(), address, None, self._clock())
        hashed = self._passwords.hash(password)
        try:
            with self._database.write() as connection:
                connection.execute(
                    insert(users).values(
                        id=account.id, email=address, password_hash=hashed, created_at=account.created_at
                    )
                )
                return account, self._new_session(connection, account.id)
        except IntegrityError as error:
            raise ValidationError(f"{address} has an account already: log in.") from error

    def log_in(self, email: str, password: str) -> Session:
        """Begins a session.

        Raises:
            AuthenticationError: no such account or another password; which of them isn't told, nor can it be
                timed.
        """
        address = normalized(email)
        wanted = select(users.c.id, users.c.password_hash).where(users.c.email == address)
        row = None
        if _is_address(address):
            with self._database.read() as connection:
                row = connection.execute(wanted).first()
        stored: str | None = None if row is None else row.password_hash
        correct = self._passwords.verify(stored, password[: LONGEST_PASSWORD + 1])
        if not correct or row is None or stored is None:
            raise AuthenticationError("The email address or the password is wrong.", 401)
        renewed = self._passwords.hash(password) if self._passwords.outdated(stored) else None
        with self._database.write() as connection:
            if renewed is not None:
                connection.execute(update(users).where(users.c.id == row.id).values(password_hash=renewed))
            connection.execute(delete(sessions).where(sessions.c.expires_at <= self._clock()))
            return self._new_session(connection, row.id)

    def refresh(self, refresh_token: str) -> Session:
        """Exchanges a refresh token for another pair.

        A token works once. One that comes a second time was copied: its whole session ends, for whoever has
        the newer ones too (RFC 9700, section 4.14.2).

        Raises:
            AuthenticationError: unknown, expired, used before, or of a session that has ended.
        """
        now, hashed = self._clock(), hash_of(refresh_token)
        with self._database.write() as connection:
            row = connection.execute(
                select(sessions.c.id, sessions.c.user_id, sessions.c.expires_at, sessions.c.revoked_at)
                .join(refresh_tokens, refresh_tokens.c.session_id == sessions.c.id)
                .where(refresh_tokens.c.token_hash == hashed)
            ).first()
            if row is not None and row.revoked_at is None and row.expires_at > now:
                taken = connection.execute(
                    update(refresh_tokens)
                    .where(refresh_tokens.c.token_hash == hashed, refresh_tokens.c.used_at.is_(None))
                    .values(used_at=now)
                )
                if taken.rowcount == 1:
                    return self._next_pair(connection, Claims(row.user_id, row.id), now)
                connection.execute(update(sessions).where(sessions.c.id == row.id).values(revoked_at=now))
                _logger.warning("session %s ended: one of its refresh tokens came back after its use", row.id)
        raise AuthenticationError("The refresh token is not valid, or was used before: log in again.", 401)

    def account_for_token(self, token: str) -> str | None:
        """The id of the account that an access token was given to, or None for a text that is none of ours.

        Raises:
            AuthenticationError: a token of ours that is expired or revoked.
        """
        claims = self._tokens.read(token)
        if claims is None:
            return None
        with self._database.read() as connection:
            open_session = connection.scalar(
                select(sessions.c.id).where(
                    sessions.c.id == claims.session_id,
                    sessions.c.user_id == claims.account_id,
                    sessions.c.revoked_at.is_(None),
                )
            )
        if open_session is None:
            raise AuthenticationError("The access token's session has ended: log in again.", 401)
        return claims.account_id

    def get(self, account_id: str | None) -> Account:
        """An account; None is the shared one of requests without an account.

        Raises:
            NotFoundError: there is none.
        """
        with self._database.read() as connection:
            row = connection.execute(
                select(users).where(users.c.id == (account_id or SHARED_ACCOUNT))
            ).first()
        if row is None:
            raise NotFoundError("there is no such account.")
        return Account(row.id, row.email, row.model_name, row.created_at)

    def set_model(self, account_id: str, model_name: str) -> None:
        """Notes which model the account works with."""
        with self._database.write() as connection:
            connection.execute(update(users).where(users.c.id == account_id).values(model_name=model_name))

    def _new_session(self, connection: Connection, account_id: str) -> Session:
        session_id, now = new_id(), self._clock()
        connection.execute(
            insert(sessions).values(id=session_id, user_id=account_id, created_at=now, expires_at=now)
        )
        return self._next_pair(connection, Claims(account_id, session_id), now)

    def _next_pair(self, connection: Connection, claims: Claims, now: float) -> Session:
        token = f"mxr-{secrets.token_urlsafe(32)}"
        connection.execute(
            update(sessions)
            .where(sessions.c.id == claims.session_id)
            .values(expires_at=now + self._refresh_lifetime)
        )
        # A session may live for years; what was used a whole lifetime ago needn't be told from nonsense.
        connection.execute(
            delete(refresh_tokens).where(
                refresh_tokens.c.session_id == claims.session_id,
                refresh_tokens.c.used_at <= now - self._refresh_lifetime,
            )
        )
        connection.execute(
            insert(refresh_tokens).values(token_hash=hash_of(token), session_id=claims.session_id)
        )
        return Session(self._tokens.issue(claims), token)


def normalized(email: str) -> str:
    """An address as it is kept and compared."""
    return unicodedata.normalize("NFC", email).strip().lower()


def _is_address(text: str) -> bool:
    return _EMAIL.fullmatch(text) is not None and text.isprintable() and len(text) <= 254
