"""Accounts: sign-up, log-in, and the model that each works with."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass

from sqlalchemy import Connection, delete, insert, select, update
from sqlalchemy.exc import IntegrityError

from ...errors import AuthenticationError, NotFoundError, ValidationError
from ..library.database import Database
from ..library.schema import SHARED_ACCOUNT, new_id, users
from .passwords import LONGEST_PASSWORD, Passwords, check_password
from .sessions import Session, Sessions

__all__ = ["User", "Users", "normalized"]

_EMAIL = re.compile(r"[^\s@]{1,64}@[^\s@.]+(\.[^\s@.]+)*")


@dataclass(frozen=True)
class User:
    """Who signed up; ``model_name`` is what ``set_model`` chose."""

    id: str
    email: str | None
    model_name: str | None
    created_at: float


class Users:
    """The accounts of a database. Methods block, and may be called from any thread.

    Args:
        database: where they are.
        passwords: hashes passwords.
        sessions: what a log-in begins.
        clock: seconds since 1970.
    """

    def __init__(
        self, database: Database, passwords: Passwords, sessions: Sessions, clock: Callable[[], float]
    ) -> None:
        self._database = database
        self._passwords = passwords
        self._sessions = sessions
        self._clock = clock

    def sign_up(self, email: str, password: str) -> tuple[User, Session]:
        """Makes an account and logs it in.

        Raises:
            ValidationError: no email address, one that has an account, or a password that ``check_password`` refuses.
        """
        user, hashed = self._newcomer(email, password)
        try:
            with self._database.write() as connection:
                _insert(connection, user, hashed)
                return user, self._sessions.begin(connection, user.id)
        except IntegrityError as error:
            raise ValidationError(f"{user.email} has an account already: log in.") from error

    def sign_up_unseen(self, email: str, password: str) -> str:
        """Makes an account where the address has none, and tells nobody which of them it was, nor by its time.

        Returns:
            The address as it is kept.

        Raises:
            ValidationError: no email address, or a password that ``check_password`` refuses.
        """
        user, hashed = self._newcomer(email, password)
        same = update(users).where(users.c.email == user.email).values(email=user.email)
        try:
            with self._database.write() as connection:
                _insert(connection, user, hashed)
        except IntegrityError:
            with self._database.write() as connection:  # waits for the disk as the other does
                connection.execute(same)
        return str(user.email)

    def _newcomer(self, email: str, password: str) -> tuple[User, str]:
        """An account that isn't kept yet, and its password's hash."""
        address = normalized(email)
        if not _is_address(address):
            raise ValidationError(f"{email[:100]!r} is no email address: write name@example.org.")
        check_password(password, address)
        return User(new_id(), address, None, self._clock()), self._passwords.hash(password)

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
            return self._sessions.begin(connection, row.id)

    def change_password(self, account_id: str, password: str, new: str) -> Session:
        """Gives an account another password, ends all of its sessions and begins a new one.

        Raises:
            AuthenticationError: the password is wrong.
            ValidationError: ``check_password`` refuses the new one.
        """
        check_password(new, self.get(account_id).email or "")
        self.check_password(account_id, password)
        hashed = self._passwords.hash(new)
        with self._database.write() as connection:
            connection.execute(update(users).where(users.c.id == account_id).values(password_hash=hashed))
            self._sessions.end_all(connection, account_id)
            return self._sessions.begin(connection, account_id)

    def check_password(self, account_id: str, password: str) -> None:
        """Raises an AuthenticationError where this isn't the account's password."""
        with self._database.read() as connection:
            stored = connection.scalar(select(users.c.password_hash).where(users.c.id == account_id))
        if not self._passwords.verify(stored, password[: LONGEST_PASSWORD + 1]):
            raise AuthenticationError("The password is wrong.", 403)

    def delete(self, account_id: str) -> None:
        """Deletes an account with its sessions and API keys; what it has made must be gone before."""
        with self._database.write() as connection:
            connection.execute(delete(users).where(users.c.id == account_id))

    def get(self, account_id: str | None) -> User:
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
        return User(row.id, row.email, row.model_name, row.created_at)

    def set_model(self, account_id: str, model_name: str) -> None:
        """Notes which model the account works with."""
        with self._database.write() as connection:
            connection.execute(update(users).where(users.c.id == account_id).values(model_name=model_name))


def normalized(email: str) -> str:
    """An address as it is kept and compared."""
    return unicodedata.normalize("NFC", email).strip().lower()


def _insert(connection: Connection, user: User, hashed: str) -> None:
    connection.execute(
        insert(users).values(id=user.id, email=user.email, password_hash=hashed, created_at=user.created_at)
    )


def _is_address(text: str) -> bool:
    return _EMAIL.fullmatch(text) is not None and text.isprintable() and len(text) <= 254
