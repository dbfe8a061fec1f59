"""A call to a server: its credentials, the time it may take, tries that are repeated where that is harmless."""

from __future__ import annotations

import json
import logging
import random
import time
import uuid
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal
from urllib.parse import quote

from ..errors import APIError, ValidationError
from .address import Address, address
from .answers import UnexpectedAnswer
from .connections import ConnectionFailed, Connections
from .credentials import SESSION_ENDED, CredentialStore
from .failures import Answer, error_of, json_of, retry_after, say_more, without_secrets
from .identity import Credentials, Tokens, is_token

__all__ = ["COMPUTE_TIMEOUT", "TIMEOUT", "Transport", "tokens_of"]

_logger = logging.getLogger(__name__)

TIMEOUT = 30.0
"""Seconds for a call that only looks something up."""
COMPUTE_TIMEOUT = 600.0
"""Seconds for a call that runs a model."""

_TRIES = 4
_FIRST_PAUSE = 0.25
_LONGEST_PAUSE = 8.0
_RETRIED = frozenset({429, 502, 503, 504})
_LOST = frozenset({502, 504})


class Transport:
    """Calls to one server, safe under threads.

    A call ends within its timeout, pauses and repeated tries included. GET and DELETE, which do no more when they
    are done twice, are repeated by themselves: on connections that fail, 502, 503, 504 and 429, with growing random
    pauses or the one that the server asks for.
    A 401 is answered with new tokens once. Redirects are not followed, so that keys stay where they belong.

    Args:
        credentials: who calls.
        base_url: as in ``address``; an ``Address`` is taken as it is.
        timeout: seconds for any call, instead of the defaults above.
        allow_http: send credentials over plain http to other machines.

    Raises:
        ValidationError: a timeout that isn't a number above 0.
    """

    def __init__(
        self,
        credentials: CredentialStore,
        base_url: str | Address | None = None,
        *,
        timeout: float | None = None,
        allow_http: bool = False,
    ) -> None:
        if timeout is not None and not (isinstance(timeout, (int, float)) and 0 < timeout < float("inf")):
            raise ValidationError(f"timeout is a number of seconds above 0; got {timeout!r}.")
        self.credentials = credentials
        self._base_url = base_url
        self._timeout = timeout
        self._allow_http = allow_http
        self._connections = Connections()

    @property
    def address(self) -> Address:
        """The server; the environment is read at each call."""
        return self._base_url if isinstance(self._base_url, Address) else address(self._base_url)

    def get(self, path: str, *, timeout: float = TIMEOUT) -> Any:
        """The JSON that the server gives for this path; errors as in ``call``."""
        return self.call("GET", path, timeout=timeout)

    def post(self, path: str, body: Mapping[str, Any], *, timeout: float = COMPUTE_TIMEOUT) -> Any:
        """The JSON that the server answers to this body; errors as in ``call``."""
        return self.call("POST", path, body, timeout=timeout)

    def delete(self, path: str, name: str) -> None:
        """Deletes what the server has under this name; errors as in ``call``.

        Args:
            path: of all things of its kind, with slashes around it.
            name: of the one: any text but ``.`` and ``..``, which mean other places in a URL however they are written.

        Raises:
            ValidationError: the name is empty, no text, or one of those two.
        """
        if not isinstance(name, str) or name in ("", ".", ".."):
            raise ValidationError(
                f"what is to be deleted is named by a text that isn't empty, nor '.' or '..'; got {name!r}."
            )
        self.call("DELETE", path + quote(name, safe=""))

    def call(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        timeout: float = TIMEOUT,
        signed: Literal["all", "key", "no"] = "all",
        secrets: tuple[str, ...] = (),
    ) -> Any:
        """Makes a call and gives the JSON of its answer, None for an empty one.

        Args:
            method: ``GET``, ``POST`` or ``DELETE``.
            path: below the base URL, with a slash in front.
            body: sent as JSON.
            timeout: seconds, unless the client was given a timeout of its own.
            signed: which credentials to send: all, at most the key, or none.
            secrets: texts of the body that no error may show.

        Raises:
            AuthenticationError: 401 and 403; a session that has ended, before anything is sent.
            NotFoundError: 404.
            ValidationError: 400 and 422; a body that JSON can't hold; credentials over plain http.
            RateLimitError: 429, with ``retry_after``.
            APIError: any other status; no connection, no answer in time, an answer that isn't JSON.
        """
        deadline = time.monotonic() + (timeout if self._timeout is None else self._timeout)
        server = self.address
        used = Credentials()
        if signed == "all":
            used = self.credentials.to_send(server.origin)
        elif signed == "key":
            used = Credentials(self.credentials.current(server.origin).api_key)
        if used or secrets:
            server.check_secrets(self._allow_http)
        data = None if body is None else _encoded(body)
        answer = self._tried(method, server, path, data, used, deadline)
        if answer.status == 401 and signed == "all":
            new = self.credentials.refresh(
                used, server.origin, lambda token: self._exchange(token, server, deadline), deadline
            )
            if new != used:
                secrets += used.secrets()
                used = new
                answer = self._tried(method, server, path, data, used, deadline)
        if not 200 <= answer.status < 300:
            error = error_of(answer, secrets + used.secrets())
            if answer.status == 404 and server.url.endswith("/v1"):
                say_more(error, "base_url ends in /v1, which is for OpenAI's clients: leave it out.")
            if answer.status == 401 and signed == "all" and self.credentials.has_ended(server.origin):
                say_more(error, SESSION_ENDED)
            raise error
        return json_of(answer, secrets + used.secrets())

    def close(self) -> None:
        """Closes the connections that are kept; a later call opens new ones."""
        self._connections.close()

    def _exchange(self, refresh_token: str, server: Address, deadline: float) -> Tokens | None:
        data = _encoded({"refresh_token": refresh_token})
        # Other threads wait for the tokens: a server that is stuck must not hold them for as long as a model may take.
        deadline = min(deadline, time.monotonic() + TIMEOUT)
        answer = self._tried("POST", server, "/auth/refresh", data, Credentials(), deadline)
        if answer.status in (400, 401, 403, 404, 422):
            return None
        if not 200 <= answer.status < 300:
            raise error_of(answer, (refresh_token,))
        return tokens_of(json_of(answer, (refresh_token,)))

    def _tried(
        self, method: str, server: Address, path: str, data: bytes | None, used: Credentials, deadline: float
    ) -> Answer:
        """The first answer that another try wouldn't better, or the last."""
        request_id = uuid.uuid4().hex
        perhaps_done = False
        for number in range(_TRIES):
            failed, answer = "", None
            again = method in ("GET", "DELETE") and number < _TRIES - 1
            try:
                answer = self._connections.request(method, server, path, data, used, deadline, request_id)
            except ConnectionFailed as error:
                failed, again = without_secrets(str(error), used.secrets()), again and error.again
            pause = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2**number) * random.uniform(0.5, 1.0)
            if answer is not None:
                again = again and answer.status in _RETRIED
                pause = max(pause, retry_after(answer.headers) or 0.0)
            if again and time.monotonic() + pause < deadline:
                why = failed or f"status {answer.status if answer else 0}"
                _logger.info("%s %s%s: %s; next try in %.2f s", method, server.url, path, why, pause)
                # What was deleted by a try whose answer got lost isn't there for the next one.
                perhaps_done = perhaps_done or answer is None or answer.status in _LOST
                time.sleep(pause)
                continue
            if answer is not None:
                if method == "DELETE" and answer.status == 404 and perhaps_done:
                    return replace(answer, status=204, body=b"")
                return answer
            break
        # Raised here, outside of the except block: the library's own exception holds the request and its headers.
        end = "" if failed.endswith("?") else "."
        raise APIError(f"{method} {server.url}{path}: {failed}{end}", request_id=request_id)


def tokens_of(answer: Any) -> Tokens:
    """The tokens in an answer's ``session``.

    Raises:
        APIError: there are none.
    """
    session = answer.get("session") if isinstance(answer, dict) else None
    access, refresh = (
        (session.get("access_token"), session.get("refresh_token") or None)
        if isinstance(session, dict)
        else (None, None)
    )
    if not is_token(access) or not (refresh is None or is_token(refresh)):
        raise UnexpectedAnswer(
            "the server's answer has no session with sound tokens: is it an Axionic server?"
        )
    return Tokens(access, refresh)


def _encoded(body: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(body, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        problem = str(error) or type(error).__name__
    raise ValidationError(
        f"these arguments can't be sent as JSON ({problem}): give texts, finite numbers and lists."
    )
