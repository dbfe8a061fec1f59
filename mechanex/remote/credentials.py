"""Who a client is to a server: an API key, the tokens of a log-in, and where they are kept."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from ..errors import APIError, AuthenticationError, MechanexError, ValidationError
from .address import PUBLIC_BACKEND, Address
from .config_file import ENTRY, ConfigFile, normal, with_entry
from .identity import NAMES, Credentials, Tokens, checked

__all__ = ["REFUSED_SECONDS", "SESSION_ENDED", "CredentialStore"]

_logger = logging.getLogger(__name__)

REFUSED_SECONDS = 60.0
"""How long a refresh token that a server refused isn't sent again."""

SESSION_ENDED = "The session has ended: login(email, password) again."


class CredentialStore:
    """The credentials of one client; safe under threads, and beside other processes with the same file.

    They are what this session was given (by ``set_*`` or the ``api_key`` argument), else ``MECHANEX_API_KEY``,
    else the file's. A key from the first two is not mixed with the file's tokens, which may be another account's.

    The file holds the latest server's credentials at its top level (``api_key``, ``access_token``,
    ``refresh_token``, and ``base_url``, which says whose they are) and those of other servers under ``others``.
    Credentials without a ``base_url`` go to whichever server is asked, but never over plain http to another
    machine, not even where ``allow_http`` is set. The server that renews their tokens is the one they are for;
    once another server's are stored, they are taken to be the public backend's.

    Args:
        api_key: the key given to the client.
    """

    def __init__(self, api_key: str | None = None) -> None:
        self.file = ConfigFile()
        # Never held while a server or another process is waited for: every call needs it.
        self._lock = threading.RLock()
        # Held by the thread that asks for new tokens; taken before the file's lock, and that before the one above.
        self._renewing = threading.Lock()
        self._session = None if api_key is None else Credentials(checked(api_key, "api_key"))
        self._session_is_stored = False
        self._email: str | None = None
        # What the file said for an origin: read again while there is nothing, and when a server answers 401.
        self._read: dict[str, Credentials] = {}
        # Until when, on the monotonic clock: a server whose clock was wrong renews it when that is right again.
        self._refused: dict[str, float] = {}
        self._kept_from: set[str] = set()

    def current(self, origin: str) -> Credentials:
        """What to send to the server at this origin."""
        with self._lock:
            found = self._known(origin)
            if self._is_refused(found.refresh_token):
                # Its owner may have logged in again elsewhere.
                if self._session is None:
                    found = self._read_file(origin)
                elif self._session_is_stored:
                    self._adopt(found, origin)
                    found = self._session
            # A session that has ended must not make a valid key useless.
            return Credentials(found.api_key) if self._is_refused(found.refresh_token) else found

    def to_send(self, origin: str) -> Credentials:
        """As ``current``, for a call that is made in the account's name.

        Raises:
            AuthenticationError: all there is is a session that has ended. Sent without it, the call would run for
                whoever the server takes an unsigned one to be.
        """
        with self._lock:
            found = self.current(origin)
            if not found and self.has_ended(origin):
                raise AuthenticationError(SESSION_ENDED)
            return found

    def has_ended(self, origin: str) -> bool:
        """Whether all there is for this server is a session that it refused to renew."""
        with self._lock:
            return not self.current(origin) and self._is_refused(self._known(origin).refresh_token)

    def _is_refused(self, refresh_token: str | None) -> bool:
        return refresh_token is not None and time.monotonic() < self._refused.get(refresh_token, -1.0)

    def _known(self, origin: str) -> Credentials:
        """What there is, a session that has ended included."""
        if self._session is not None:
            return self._session
        if key := os.environ.get("MECHANEX_API_KEY", "").strip():
            return Credentials(checked(key, "MECHANEX_API_KEY"))
        return self._read.get(origin) or self._read_file(origin)

    def set_key(self, api_key: str, origin: str, *, same_account: bool = False, persist: bool) -> None:
        """Uses this key from now on, beside the tokens that this session was given.

        Args:
            api_key: of an account, or the server's.
            origin: the server it is for.
            same_account: whether it is known to belong to the account that is logged in.
            persist: whether to store it for other processes.
        """
        key = checked(api_key, "api_key")
        with self.file.locked(persist), self._lock:
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
        access = checked(tokens.access_token, "access_token")
        refresh = None if tokens.refresh_token is None else checked(tokens.refresh_token, "refresh_token")
        with self.file.locked(persist), self._lock:
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
            MechanexError: the file can't be read, so that nobody knows what it holds, or not written. It stays as it
                is then; this session has forgotten all the same.
        """
        with self._lock:
            self._session, self._session_is_stored, self._email = Credentials(), False, None
            self._read.clear()
        with self.file.locked(bool(self._to_forget())), self._lock:
            self._session, self._session_is_stored, self._email = Credentials(), False, None
            self._read.clear()
            found = self._to_forget()
            ours = {*ENTRY, "base_url", "others"}
            if not ours & found.keys():
                return False
            self.file.update(lambda data: {name: data[name] for name in data.keys() - ours})
            return True

    def _to_forget(self) -> dict[str, Any]:
        try:
            return self.file.load()
        except MechanexError as error:
            raise MechanexError(
                f"{error}: it stays as it is, with the secrets that may be in it. Repair or delete it."
            ) from error

    def refresh(
        self, used: Credentials, origin: str, exchange: Callable[[str], Tokens | None], deadline: float
    ) -> Credentials:
        """What to send after the server refused ``used``; of many threads and processes, one asks for new tokens.

        Args:
            used: what was sent.
            origin: the server's.
            exchange: new tokens for a refresh token, or None where the server refuses it.
            deadline: on the monotonic clock, how long to wait for another thread or process that renews them.

        Returns:
            Other credentials, or ``used`` where there is nothing else to try.

        Raises:
            APIError: the deadline passed; going on would spend a refresh token twice, which ends the session.
        """
        renewable = used.refresh_token is not None
        with self._turn(renewable, deadline):
            stored = self._session is None or self._session_is_stored
            with self.file.locked(stored and renewable, deadline):
                with self._lock:
                    stored = stored and (self._session is None or self._session_is_stored)
                    if stored:
                        self._adopt(used, origin)
                    now = self.current(origin)
                if now != used:
                    return now if now else used
                if used.refresh_token is None:
                    return used
                bought = exchange(used.refresh_token)
                with self._lock:
                    if bought is None:
                        self._refused[used.refresh_token] = time.monotonic() + REFUSED_SECONDS
                        return self.current(origin) or used
                    return self._renewed(used, bought, origin, stored)

    @contextlib.contextmanager
    def _turn(self, wanted: bool, deadline: float) -> Iterator[None]:
        if not wanted:
            yield
            return
        left = min(max(0.0, deadline - time.monotonic()), threading.TIMEOUT_MAX)
        if not self._renewing.acquire(timeout=left):
            raise APIError(
                "another thread was still renewing the session's tokens when this call's time was over: call "
                "again, or give calls a longer timeout."
            )
        try:
            yield
        finally:
            self._renewing.release()

    def _renewed(self, used: Credentials, bought: Tokens, origin: str, stored: bool) -> Credentials:
        refresh = bought.refresh_token or used.refresh_token
        now = self.current(origin)
        # Another account's may be in the file by now.
        if stored and self._read_file(origin).refresh_token == used.refresh_token:
            changes = {"access_token": bought.access_token, "refresh_token": refresh}
            try:
                self.file.update(
                    lambda found: with_entry(
                        {**found, "base_url": found.get("base_url") or origin}, origin, changes
                    )
                )
                self._read.pop(origin)
            except MechanexError as error:
                _logger.warning("the new tokens are kept in this session only: %s", error)
        if now.refresh_token != used.refresh_token:  # set, or forgotten, while the server was asked
            return now or used
        new = replace(now, access_token=bought.access_token, refresh_token=refresh)
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
        for name in NAMES:
            if entry.get(name) is None:
                continue
            try:
                given[name] = checked(entry[name], name)
            except ValidationError as error:
                self.file.warn(f"{self.file.path}: {error}")
        self._read[origin] = Credentials(**given)
        return self._read[origin]

    def _entry(self, origin: str) -> Mapping[str, Any]:
        found = self.file.read()
        belongs = found.get("base_url")
        if self._origin(belongs) == origin or (belongs is None and self._may_have(origin, found)):
            return found
        others = found.get("others")
        for name, entry in others.items() if isinstance(others, dict) else ():
            if isinstance(entry, dict) and self._origin(name) == origin:
                return entry
        return {}

    def _origin(self, base_url: object) -> str | None:
        """The server that an entry of the file is for; None, with a warning, where that can't be read."""
        if base_url is None:
            return None
        found = normal(base_url)
        if found is None:
            self.file.warn(
                f"{self.file.path} has credentials for a base_url that is no http or https URL, which are sent "
                f"nowhere: give it a form such as {PUBLIC_BACKEND}"
            )
        return found

    def _may_have(self, origin: str, nameless: Mapping[str, Any]) -> bool:
        """Whether credentials that name no server may go to this one."""
        if origin.startswith("https:") or Address(origin, origin, True).is_loopback:
            return True
        if origin not in self._kept_from and not nameless.keys().isdisjoint(NAMES):
            self._kept_from.add(origin)
            _logger.warning(
                "the credentials in %s name no base_url, and are not sent to %s over plain http: log in there, or "
                "call set_key(key, persist=True)",
                self.file.path,
                origin,
            )
        return False

    def _save(self, origin: str, changes: Mapping[str, str | None]) -> None:
        self.file.update(lambda found: with_entry(found, origin, changes))
        self._read.pop(origin, None)
