"""The part of a client that is about its account: signing up, logging in, API keys."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from typing import Any, Literal, TypeVar

from ..errors import AuthenticationError, MechanexError, ValidationError
from .answers import field, listed, object_of, without_secrets
from .bodies import list_of
from .identity import Tokens
from .transport import TIMEOUT, Transport, tokens_of

__all__ = ["AccountCalls"]

_logger = logging.getLogger(__name__)

_LOGOUT_TIMEOUT = 5.0

Self = TypeVar("Self", bound="AccountCalls")


class AccountCalls:
    """The account calls of a client. Each raises, beside what it names, whatever ``Transport.call`` raises.

    Attributes:
        transport: the HTTP calls.
    """

    transport: Transport

    @property
    def is_remote(self) -> bool:
        """Whether there is a key or token for the server; the file of stored credentials may be read.

        It stays true when a session ends, so that calls say so and don't run elsewhere without a word.
        """
        credentials, origin = self.transport.credentials, self.transport.address.origin
        return bool(credentials.current(origin)) or credentials.has_ended(origin)

    def require_remote(self, caller: str, otherwise: str = "") -> None:
        """Checks, before anything is sent, that there is a server to ask: credentials, or one chosen by its URL.

        Args:
            caller: the call's documented name, for the message.
            otherwise: a sentence on what else there is to do.

        Raises:
            AuthenticationError: there is neither; names the ways out.
        """
        if self.is_remote or self.transport.address.chosen:
            return
        raise AuthenticationError(
            f"{caller} needs a server, and there are no credentials for one: login(email, password), "
            "set_key(key) or MECHANEX_API_KEY; MECHANEX_BASE_URL or Mechanex(base_url=…) for a server of your "
            f"own. {otherwise}".rstrip()
        )

    def signup(self, email: str, password: str, *, persist: bool = True) -> dict[str, Any]:
        """Register a new user; logged in at once, unless the server wants the address confirmed first.

        A key that is set is sent along: a server of one's own may ask newcomers for its key.

        Args:
            email: of the new account.
            password: sent, never kept.
            persist: keep the tokens in the file of stored credentials.

        Returns:
            The server's answer with its tokens masked: ``session`` (None until confirmed) and ``user``.

        Raises:
            ValidationError: an empty argument, or what the server finds wrong with them.
            MechanexError: the file of stored credentials can't be written; the account is made all the same.
        """
        answer = self._enter("signup", email, password, "key")
        if not answer.get("session"):
            return answer
        try:
            return self._entered(answer, email, persist=persist)
        except MechanexError as error:
            raise MechanexError(
                f"{email.strip()} is signed up, but not logged in here ({error}): login(email, password), or "
                "mechanex login, goes on from there."
            ) from error

    def login(self, email: str, password: str, *, persist: bool = True) -> dict[str, Any]:
        """Authenticate; later calls of this client carry the tokens, which renew themselves.

        Arguments and errors as in ``signup``; a wrong password is an AuthenticationError.

        Returns:
            The server's answer with its tokens masked.
        """
        return self._entered(self._enter("login", email, password, "no"), email, persist=persist)

    def logout(self) -> bool:
        """Ends the session on the server, and forgets the credentials, in this client and in the file.

        A server that can't be reached keeps the session until it expires; a warning says so.

        Returns:
            Whether the file held any credentials.

        Raises:
            MechanexError: the file can't be read or written, and stays as it is.
        """
        credentials = self.transport.credentials
        with contextlib.suppress(MechanexError):  # of the file, which is told below
            token = credentials.current(self.transport.address.origin).refresh_token
            if token is not None:
                self._end_session_of(token)
        return credentials.forget()

    def list_sessions(self) -> list[dict[str, Any]]:
        """The account's sessions, one for each log-in that hasn't ended: ``id``, ``created_at``, ``expires_at``."""
        self.require_remote("list_sessions")
        found = listed(self.transport.get("/auth/sessions"), "list_sessions", "sessions")
        return [object_of(session, "list_sessions") for session in found]

    def end_session(self, session_id: str) -> None:
        """Ends one of the account's sessions at once; takes a log-in, which an API key is not.

        Args:
            session_id: the ``id`` that ``list_sessions`` shows.

        Raises:
            NotFoundError: the account has no such session.
        """
        self.require_remote("end_session")
        self.transport.delete("/auth/sessions/", session_id)

    def change_password(self, password: str, new_password: str, *, persist: bool = True) -> dict[str, Any]:
        """Changes the password of the account, whose sessions all end; this client goes on with a new one.

        Args:
            password: the one until now.
            new_password: the next one.
            persist: keep the new tokens in the file of stored credentials.

        Returns:
            The server's answer with its tokens masked.

        Raises:
            ValidationError: an empty argument, or a new password that the server finds wrong.
            AuthenticationError: the password is wrong, or only an API key is known.
        """
        self.require_remote("change_password")
        body = _not_empty(password=password, new_password=new_password)
        answer = self.transport.call("POST", "/auth/password", body, secrets=(password, new_password))
        given = object_of(answer, "change_password")
        user = object_of(given.get("user"), "change_password")
        return self._entered(given, field(user, "change_password", str, "email"), persist=persist)

    def delete_account(self, password: str) -> None:
        """Deletes the account with its vectors, behaviors, keys and sessions, and forgets the credentials.

        Raises:
            AuthenticationError: the password is wrong, or only an API key is known.
        """
        self.require_remote("delete_account")
        body = _not_empty(password=password)
        self.transport.call("POST", "/auth/delete-account", body, secrets=(password,))
        self.transport.credentials.forget()

    def set_key(self: Self, api_key: str, *, persist: bool = False) -> Self:
        """Uses an API key from now on; ``persist`` keeps it in the file of stored credentials.

        Raises:
            ValidationError: a text that can't be a key.
            MechanexError: the file can't be written.
        """
        self.transport.credentials.set_key(api_key, self.transport.address.origin, persist=persist)
        return self

    def set_token(
        self: Self, access_token: str, refresh_token: str | None = None, *, persist: bool = False
    ) -> Self:
        """Uses the tokens of a log-in made elsewhere; errors as in ``set_key``.

        Args:
            access_token: sent as ``Authorization: Bearer``.
            refresh_token: buys a new access token when the server says 401.
            persist: keep them in the file of stored credentials.
        """
        tokens = Tokens(access_token, refresh_token)
        self.transport.credentials.set_tokens(tokens, self.transport.address.origin, persist=persist)
        return self

    def list_api_keys(self) -> list[dict[str, Any]]:
        """List API keys for the current user: ``id``, ``name``, ``created_at``, ``last_used``.

        A server of this version tells ``expires_at`` and ``scopes`` too; None is no end, and all that a key may do.
        """
        self.require_remote("list_api_keys")
        keys = listed(self.transport.get("/auth/api-keys"), "list_api_keys", "keys")
        return [object_of(key, "list_api_keys") for key in keys]

    def create_api_key(
        self,
        name: str = "Default Key",
        *,
        persist: bool = False,
        scopes: Sequence[str] | None = None,
        expires_days: float | None = None,
    ) -> dict[str, Any]:
        """Create a new API key for the current user, on a server of one's own by a log-in, not by another key.

        Args:
            name: for people.
            scopes: what it may do, of ``"generate"`` (have text written), ``"vectors"`` (make and delete vectors and
                behaviors) and ``"admin"`` (look after the account); None for all of it. For a server of one's own.
            expires_days: days until it ends; None for no end. For a server of one's own.
            persist: use the key from now on, and keep it in the file of stored credentials; where that can't be
                written, a warning says so.

        Returns:
            The server's answer, with the key, which no later call shows, under ``key``.

        Raises:
            ValidationError: an empty name, a scope that the server doesn't know, or days that aren't above 0.
            AuthenticationError: only an API key is known, and the server takes a log-in.
        """
        if not isinstance(name, str) or not name.strip():
            raise ValidationError(f"the name of an API key is a text that isn't empty; got {name!r}.")
        named = None if scopes is None else list_of("scopes", scopes, "names")
        self.require_remote("create_api_key")
        asked = {"scopes": named, "expires_days": expires_days}
        body = {"name": name} | {name: value for name, value in asked.items() if value is not None}
        answer = self.transport.post("/auth/api-keys", body, timeout=TIMEOUT)
        given = object_of(answer, "create_api_key")
        # An answer of another shape may hold the key elsewhere: an error must not carry it.
        key = field({"key": given.get("key") or given.get("api_key")}, "create_api_key", str, "key")
        made = {**given, "key": key}
        if persist:
            credentials, origin = self.transport.credentials, self.transport.address.origin
            try:
                credentials.set_key(key, origin, same_account=True, persist=True)
            except MechanexError as error:  # the key is shown this once: it must reach the caller
                _logger.warning("the new key is not stored: %s", error)
        return made

    def delete_api_key(self, key_id: str) -> None:
        """Ends one of the current user's API keys at once, on a server of one's own.

        Args:
            key_id: the ``id`` that ``list_api_keys`` shows.

        Raises:
            NotFoundError: the user has no such key.
        """
        self.require_remote("delete_api_key")
        self.transport.delete("/auth/api-keys/", key_id)

    def whoami(self) -> dict[str, Any]:
        """Get current user information: ``id``, ``email`` and what else the server tells."""
        self.require_remote("whoami")
        return object_of(self.transport.get("/auth/whoami"), "whoami")

    def set_model(self, model_name: str) -> dict[str, Any]:
        """Chooses the model that the server runs this account's calls on.

        Raises:
            ValidationError: an empty name.
            NotFoundError: the server has no such model.
        """
        if not isinstance(model_name, str) or not model_name.strip():
            raise ValidationError(f"a model's name is a text that isn't empty; got {model_name!r}.")
        self.require_remote("set_model")
        answer = self.transport.post("/auth/api-keys/set-model", {"model_name": model_name}, timeout=TIMEOUT)
        return answer if isinstance(answer, dict) else {}

    def _enter(self, call: str, email: str, password: str, signed: Literal["key", "no"]) -> dict[str, Any]:
        body = _not_empty(email=email, password=password)
        body["email"] = body["email"].strip()
        answer = self.transport.call("POST", f"/auth/{call}", body, signed=signed, secrets=(password,))
        return object_of(answer, call)

    def _end_session_of(self, refresh_token: str) -> None:
        try:
            self.transport.call(
                "POST",
                "/auth/logout",
                {"refresh_token": refresh_token},
                timeout=_LOGOUT_TIMEOUT,
                signed="no",
                secrets=(refresh_token,),
            )
        except MechanexError as error:
            _logger.warning("the session goes on at the server until it expires: %s", error)

    def _entered(self, answer: dict[str, Any], email: str, *, persist: bool) -> dict[str, Any]:
        tokens = tokens_of(answer)
        credentials, origin = self.transport.credentials, self.transport.address.origin
        credentials.set_tokens(tokens, origin, email=email.strip().lower(), persist=persist)
        given = tuple(text for text in (tokens.access_token, tokens.refresh_token) if text is not None)
        masked: dict[str, Any] = without_secrets(answer, given)
        return masked


def _not_empty(**texts: str) -> dict[str, str]:
    for name, text in texts.items():
        if not isinstance(text, str) or not text.strip():
            raise ValidationError(f"{name} is a text that isn't empty.")
    return texts
