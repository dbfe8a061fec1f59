"""A call to a server: its credentials, the time it may take, and what comes of it."""

from __future__ import annotations

import json
import os
import threading
import time
import uuid
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import quote

from ..errors import APIError, ValidationError
from .address import Address, address
from .answers import Answer, UnexpectedAnswer, error_of, json_of, say_more, unpacked, without_secrets
from .credentials import SESSION_ENDED, CredentialStore
from .identity import Credentials, Tokens, is_token

if TYPE_CHECKING:
    import requests

__all__ = ["COMPUTE_TIMEOUT", "MAX_ANSWER_BYTES", "TIMEOUT", "Transport", "tokens_of"]

TIMEOUT = 30.0
"""Seconds for a call that only looks something up."""
COMPUTE_TIMEOUT = 600.0
"""Seconds for a call that runs a model."""
MAX_ANSWER_BYTES = 64 * 2**20
"""Most bytes of an answer; as Python's objects they may take twenty times as much."""
_CONNECT_TIMEOUT = 10.0
_LOST = (502, 504)


class Transport:
    """Calls to one server, safe under threads.

    A call ends within its timeout, pauses and repeated tries included. GET and DELETE, which do no more when they
    are done twice, are repeated by themselves: on connections that fail, 502, 503, 504 and 429, at once, then after
    growing random pauses, or after the one that the server asks for.
    A 401 is answered with new tokens once. Redirects are not followed, so that keys stay where they belong.

    Args:
        credentials: who calls.
        base_url: as in ``address``; an ``Address`` is taken as it is.
        timeout: seconds for any call, instead of the defaults above.
        allow_http: send credentials over plain http to other machines.
        max_answer_bytes: most bytes of an answer, packed and unpacked.

    Raises:
        ValidationError: a timeout that isn't a number above 0, or a bound that isn't a whole one.
    """

    def __init__(
        self,
        credentials: CredentialStore,
        base_url: str | Address | None = None,
        *,
        timeout: float | None = None,
        allow_http: bool = False,
        max_answer_bytes: int = MAX_ANSWER_BYTES,
    ) -> None:
        if timeout is not None and not (isinstance(timeout, (int, float)) and 0 < timeout < float("inf")):
            raise ValidationError(f"timeout is a number of seconds above 0; got {timeout!r}.")
        whole = isinstance(max_answer_bytes, int) and not isinstance(max_answer_bytes, bool)
        if not whole or max_answer_bytes < 1:
            raise ValidationError(f"max_answer_bytes is a whole number above 0; got {max_answer_bytes!r}.")
        self._max_answer_bytes = max_answer_bytes
        self.credentials = credentials
        self._base_url = base_url
        self._timeout = timeout
        self._allow_http = allow_http
        self._session: requests.Session | None = None
        self._pid = 0
        self._lock = threading.Lock()

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
        answer = self._sent(method, server, path, data, used, deadline)
        if answer.status == 401 and signed == "all":
            new = self.credentials.refresh(
                used, server.origin, lambda token: self._exchange(token, server, deadline), deadline
            )
            if new != used:
                secrets += used.secrets()
                used = new
                answer = self._sent(method, server, path, data, used, deadline)
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
        with self._lock:
            session, self._session = self._session, None
        if session is not None:
            session.close()

    def _exchange(self, refresh_token: str, server: Address, deadline: float) -> Tokens | None:
        data = _encoded({"refresh_token": refresh_token})
        # Other threads wait for the tokens: a server that is stuck must not hold them for as long as a model may take.
        deadline = min(deadline, time.monotonic() + TIMEOUT)
        answer = self._sent("POST", server, "/auth/refresh", data, Credentials(), deadline)
        if answer.status in (400, 401, 403, 404, 422):
            return None
        if not 200 <= answer.status < 300:
            raise error_of(answer, (refresh_token,))
        return tokens_of(json_of(answer, (refresh_token,)))

    def _sent(
        self, method: str, server: Address, path: str, data: bytes | None, used: Credentials, deadline: float
    ) -> Answer:
        """The answer, read to its end; GET and DELETE are tried again where that may help."""
        from .connections import FAILURES, new_session, reason_of
        from .deadline import left, until

        with self._lock:
            # After a fork, the parent's sockets are not the child's to use.
            if self._session is None or self._pid != os.getpid():
                self._session, self._pid = new_session(), os.getpid()
            session = self._session
        request_id = uuid.uuid4().hex
        headers = {"Accept": "application/json", "x-request-id": request_id}
        if data is not None:
            headers["Content-Type"] = "application/json"
        if used.api_key is not None:
            headers["x-api-key"] = used.api_key
        if used.access_token is not None:
            headers["Authorization"] = f"Bearer {used.access_token}"
        try:
            with until(deadline, self._max_answer_bytes):
                response = session.request(
                    method,
                    server.url + path,
                    data=data,
                    headers=headers,
                    auth=lambda request: request,  # without one, requests looks into ~/.netrc
                    timeout=(_CONNECT_TIMEOUT, left()),
                    allow_redirects=False,
                    stream=True,
                    # Proxies are for other machines; one that sees loopback calls would see their keys.
                    proxies=dict.fromkeys(("http", "https", "all"), "") if server.is_loopback else None,
                )
        except FAILURES as error:
            failed = without_secrets(reason_of(error), used.secrets())
        else:
            status, body = response.status_code, response.raw.data
            tries = response.raw.retries.history if response.raw.retries else ()
            # What was deleted by a try whose answer got lost isn't there for the next one.
            if (
                method == "DELETE"
                and status == 404
                and any(one.error or one.status in _LOST for one in tries)
            ):
                status, body = 204, b""
            their_id = response.headers.get("x-request-id") or request_id
            try:
                body = unpacked(body, response.headers.get("content-encoding", ""), self._max_answer_bytes)
            except APIError as error:
                if 200 <= status < 300:
                    error.status_code, error.request_id = status, without_secrets(their_id, used.secrets())
                    raise
                body = b""  # the status says enough
            return Answer(status, response.reason or "", response.headers, body, their_id)
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
