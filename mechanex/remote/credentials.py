"""Who a client is to a server: an API key, the tokens of a log-in, and where they are kept."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, TypeGuard

from ..errors import MechanexError, ValidationError
from .address import PUBLIC_BACKEND
from .config_file import ConfigFile

__all__ = ["CredentialStore", "Credentials", "Tokens", "is_token"]

_logger = logging.getLogger(__name__)

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
        there = ", ".join(name for name in _NAMES if getattr(self, name) is not None)
        return f"<Credentials: {there or 'none'}>"

    def secrets(self) -> tuple[str, ...]:
        """The texts that must not be shown anywhere."""
        return tuple(text for name in _NAMES if (text := getattr(self, name)) is not None)


_NAMES = tuple(field.name for field in fields(Credentials))
# What a server's entry in the file may hold.
_ENTRY = (*_NAMES, "email", "previous_api_key")


@dataclass(frozen=True, repr=False)
class Tokens:
    """The tokens of a log-in; the server may give no refresh token."""

    access_token: str
    refresh_token: str | None = None


class CredentialStore:
    """The credentials of one client; safe under threads, and beside other processes with the same file.

    They are what this session was given (by ``set_*`` or the ``api_key`` argument), else ``MECHANEX_API_KEY``,
    else the file's. A key from the first two is not mixed with the file's tokens, which may be another account's.

    The file holds the latest server's credentials at its top level (``api_key``, ``access_token``,
    ``refresh_token``, and ``base_url``, which says whose they are) and those of other servers under ``others``.
    Credentials without a ``base_url`` go to whichever server is asked.

    Args:
        api_key: the key given to the client.
    """

    def __init__(self, api_key: str | None = None) -> None:
        self.file = ConfigFile()
        self._lock = threading.RLock()
        self._session = None if api_key is None else Credentials(_checked(api_key, "api_key"))
        self._session_is_stored = False
        self._email: str | None = None
        # What the file said for an origin: read again while there is nothing, and when a server answers 401.
        self._read: dict[str, Credentials] = {}
        self._refused: set[str] = set()

    def current(self, origin: str) -> Credentials:
        """What to send to the server at this origin."""
        with self._lock:
            found = self._session
            if found is None and (key := os.environ.get("MECHANEX_API_KEY", "").strip()):
                found = Credentials(_checked(key, "MECHANEX_API_KEY"))
            if found is None:
                found = self._read.get(origin) or self._read_file(origin)
            # A session that has ended must not make a valid key useless.
            return Credentials(found.api_key) if found.refresh_token in self._refused else found

    def set_key(self, api_key: str, origin: str, *, same_account: bool = False, persist: bool) -> None:
        """Uses this key from now on, beside the tokens that this session was given.

        Args:
            api_key: of an account, or the server's.
            origin: the server it is for.
            same_account: whether it is known to belong to the account that is logged in.
            persist: whether to store it for other processes.
        """
        key = _checked(api_key, "api_key")
        with self._lock, self.file.locked(persist):
            before = self.current(origin) if same_account else self._session or Credentials()
            if self._session is None:
                self._session_is_stored = same_account
            if persist:
                self._save(origin, {"api_key": key} if same_account else {"api_key": key, "email": None})
            self._session = replace(before, api_key=key)
            self._email = self._email if same_account else None

    def set_tokens(self, tokens: Tokens, origin: str, *, email: str | None = None, persist: bool) -> None:
        """Uses these tokens from now on.

        Those of a log-in go with the key only where it is known to be the same account's: a server asked with the
        key of one account and the token of another could take either. A stored key that makes way stays in the
        file as ``previous_api_key``.

        Args:
            tokens: of a log-in.
            origin: the server that gave them.
            email: who logged in; None for tokens that were set by hand, which leave the key.
            persist: whether to store them for other processes.
        """
        access = _checked(tokens.access_token, "access_token")
        refresh = None if tokens.refresh_token is None else _checked(tokens.refresh_token, "refresh_token")
        with self._lock, self.file.locked(persist):
            entry = self._entry(origin)
            same = email is None or email == (self._email or entry.get("email"))
            key = self.current(origin).api_key if same else None
            if persist:
                changes = {"access_token": access, "refresh_token": refresh, "email": email}
                if not same and isinstance(entry.get("api_key"), str):
                    changes |= {"api_key": None, "previous_api_key": entry["api_key"]}
                    _logger.warning(
                        "the API key in %s may be another account's: set aside there as previous_api_key",
                        self.file.path,
                    )
                self._save(origin, changes)
            self._session, self._session_is_stored = Credentials(key, access, refresh), persist
            self._email = email

    def forget(self) -> bool:
        """Forgets everything, in this session and in the file; says whether the file held anything.

        Raises:
            MechanexError: the file can't be written.
        """
        with self._lock, self.file.locked(bool(self.file.read())):
            self._session, self._session_is_stored, self._email = Credentials(), False, None
            self._read.clear()
            found = self.file.read()
            ours = {*_ENTRY, "base_url", "others"}
            if not ours & found.keys():
                return False
            self.file.update(lambda data: {name: data[name] for name in data.keys() - ours})
            return True

    def refresh(
        self, used: Credentials, origin: str, exchange: Callable[[str], Tokens | None]
    ) -> Credentials:
        """What to send after the server refused ``used``; of many threads and processes, one asks for new tokens.

        Args:
            used: what was sent.
            origin: the server's.
            exchange: new tokens for a refresh token, or None where the server refuses it.

        Returns:
            Other credentials, or ``used`` where there is nothing else to try.
        """
        stored = self._session is None or self._session_is_stored
        with self._lock, self.file.locked(stored and used.refresh_token is not None):
            if stored:
                self._adopt(used, origin)
            now = self.current(origin)
            if now != used:
                return now if now else used
            if used.refresh_token is None:
                return used
            bought = exchange(used.refresh_token)
            if bought is None:
                self._refused.add(used.refresh_token)
                return self.current(origin) or used
            new = Credentials(used.api_key, bought.access_token, bought.refresh_token or used.refresh_token)
            if stored:
                try:
                    self._save(origin, {"access_token": new.access_token, "refresh_token": new.refresh_token})
                except MechanexError as error:
                    _logger.warning("the new tokens are kept in this session only: %s", error)
            if self._session is None:
                self._read[origin] = new
            else:
                self._session = new
            return new

    def _adopt(self, used: Credentials, origin: str) -> None:
        """Takes what another process has put into the file meanwhile."""
        stored = self._read_file(origin)
        same_account = self._entry(origin).get("email") == self._email
        if (
            self._session is not None
            and same_account
            and stored.access_token not in (None, used.access_token)
        ):
            self._session = stored

    def _read_file(self, origin: str) -> Credentials:
        entry = self._entry(origin)
        given: dict[str, str] = {}
        for name in _NAMES:
            if entry.get(name) is None:
                continue
            try:
                given[name] = _checked(entry[name], name)
            except ValidationError as error:
                _logger.warning("%s: %s", self.file.path, error)
        self._read[origin] = Credentials(**given)
        return self._read[origin]

    def _entry(self, origin: str) -> Mapping[str, Any]:
        found = self.file.read()
        if found.get("base_url") in (None, origin):
            return found
        others = found.get("others")
        entry = others.get(origin) if isinstance(others, dict) else None
        return entry if isinstance(entry, dict) else {}

    def _save(self, origin: str, changes: Mapping[str, str | None]) -> None:
        self.file.update(lambda found: _with_entry(found, origin, changes))
        self._read.pop(origin, None)


def _with_entry(found: dict[str, Any], origin: str, changes: Mapping[str, str | None]) -> dict[str, Any]:
    """The file's fields with this server's on top, changed; another server's move to ``others``."""
    belongs = found.get("base_url") or PUBLIC_BACKEND
    if belongs != origin:
        top = {name: found.pop(name) for name in _ENTRY if name in found}
        others = dict(found["others"]) if isinstance(found.get("others"), dict) else {}
        if top:
            others[str(belongs)] = top
        entry = others.pop(origin, None)
        found = {**found, **(entry if isinstance(entry, dict) else {}), "others": others or None}
    found = {**found, **changes, "base_url": origin}
    return {name: value for name, value in found.items() if value is not None}


def is_token(text: object) -> TypeGuard[str]:
    """Whether a header can hold it: printable ASCII without spaces, not empty, not endless."""
    return (
        isinstance(text, str)
        and 0 < len(text) <= _MOST_CHARACTERS
        and text.isascii()
        and text.isprintable()
        and " " not in text
    )


def _checked(text: object, name: str) -> str:
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
