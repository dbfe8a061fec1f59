"""The connections to servers, which are kept: one call over them, tried again where that is harmless."""

from __future__ import annotations

import logging
import ssl
from collections.abc import Iterator
from http.cookiejar import DefaultCookiePolicy
from typing import Any

import requests
import urllib3
from urllib3.exceptions import (
    ConnectTimeoutError,
    MaxRetryError,
    NewConnectionError,
    ReadTimeoutError,
    SSLError,
)

from .._version import __version__
from .address import Address
from .answers import Answer, retry_after
from .deadline import DeadlineAdapter, GivenUp, is_timed, left, until
from .identity import Credentials

__all__ = ["exchange", "new_session"]

_logger = logging.getLogger(__name__)

_CONNECT_TIMEOUT = 10.0
_LOST = (502, 504)

# urllib3 warns of each try that failed, and may quote a key; what fails in the end is told.
logging.getLogger(urllib3.connectionpool.__name__).addFilter(
    lambda record: not is_timed() or record.levelno < logging.WARNING
)


class _Retry(urllib3.Retry):
    """Tries that fit into the call's time."""

    def increment(
        self, method: str | None = None, url: str | None = None, *arguments: Any, **facts: Any
    ) -> _Retry:
        error, response = facts.get("error"), facts.get("response")
        if error is not None and (method not in (self.allowed_methods or ()) or _is_insecure(error)):
            raise error
        tried = super().increment(method, url, *arguments, **facts)
        asked = self.get_retry_after(response) if response is not None else None
        if (asked or tried.get_backoff_time() + tried.backoff_jitter) >= left():
            raise MaxRetryError(facts["_pool"], str(url), error)
        why = f"status {response.status}" if response is not None else type(error).__name__
        _logger.info("%s %s: %s; there is another try", method, url, why)
        return tried

    def get_retry_after(self, response: Any) -> float | None:
        return retry_after(response.headers)


def new_session() -> requests.Session:
    """A pool of connections, safe under threads, that keeps no cookies; opens none yet."""
    session = requests.Session()
    session.headers["User-Agent"] = f"mechanex/{__version__}"
    # The size of an answer is bounded as it is sent: it must not unpack to more.
    session.headers["Accept-Encoding"] = "identity"
    session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
    retries = _Retry(
        total=3,
        allowed_methods=("GET", "DELETE"),
        status_forcelist=(429, 503, *_LOST),
        backoff_factor=0.25,
        backoff_jitter=0.25,
        backoff_max=8.0,
        raise_on_status=False,
    )
    adapter = DeadlineAdapter(pool_connections=4, pool_maxsize=32, max_retries=retries)
    for scheme in ("https://", "http://"):
        session.mount(scheme, adapter)
    return session


def exchange(
    session: requests.Session,
    method: str,
    server: Address,
    path: str,
    data: bytes | None,
    used: Credentials,
    deadline: float,
    request_id: str,
) -> Answer | str:
    """Sends a request and reads the answer to its end; GET and DELETE are tried again where that may help.

    Args:
        session: as ``new_session`` makes one.
        method: ``GET``, ``POST`` or ``DELETE``.
        server: where to.
        path: below the server's URL, with a slash in front.
        data: JSON, or None.
        used: credentials to send.
        deadline: on the clock of ``time.monotonic``.
        request_id: names the call in the server's log.

    Returns:
        The answer, or why there is none; that text may quote a secret.
    """
    headers = {"Accept": "application/json", "x-request-id": request_id}
    if data is not None:
        headers["Content-Type"] = "application/json"
    if used.api_key is not None:
        headers["x-api-key"] = used.api_key
    if used.access_token is not None:
        headers["Authorization"] = f"Bearer {used.access_token}"
    try:
        with until(deadline):
            response = session.request(
                method,
                server.url + path,
                data=data,
                headers=headers,
                auth=_as_it_is,  # without one, requests looks into ~/.netrc
                timeout=(_CONNECT_TIMEOUT, left()),
                allow_redirects=False,
                stream=True,
                # Proxies are for other machines; one that sees loopback calls would see their keys.
                proxies=dict.fromkeys(("http", "https", "all"), "") if server.is_loopback else None,
            )
    except GivenUp as error:
        return str(error)
    except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
        return _reason(error)
    status, body = response.status_code, response.raw.data
    tries = response.raw.retries.history if response.raw.retries else ()
    # What was deleted by a try whose answer got lost isn't there for the next one.
    if method == "DELETE" and status == 404 and any(one.error or one.status in _LOST for one in tries):
        status, body = 204, b""
    their_id = response.headers.get("x-request-id") or request_id
    return Answer(status, response.reason or "", response.headers, body, their_id)


def _as_it_is(request: requests.PreparedRequest) -> requests.PreparedRequest:
    return request


def _reason(error: BaseException) -> str:
    causes = list(_causes(error))
    told = " ".join(str(causes[-1]).split()) or type(causes[-1]).__name__
    if any(map(_is_insecure, causes)):
        return f"the connection is not secure ({told})"
    for one in causes:
        if isinstance(one, ConnectTimeoutError) and not isinstance(one, NewConnectionError):
            return "no connection in time: is the server's address right, and is it up?"
        if isinstance(one, (ReadTimeoutError, TimeoutError)):
            return "no answer in time: the server is slow or stuck; give the client a longer timeout"
    return f"the connection failed ({told}): is the server's address right, and is it up?"


def _is_insecure(error: BaseException) -> bool:
    # A handshake that is cut off says nothing about who is there.
    cut = (ssl.SSLEOFError, ssl.SSLZeroReturnError)
    return isinstance(error, SSLError) and not any(isinstance(one, cut) for one in _causes(error))


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and those it came from, the innermost last."""
    seen: set[int] = set()
    inner: object = error
    while isinstance(inner, BaseException) and id(inner) not in seen:
        seen.add(id(inner))
        yield inner
        # requests has urllib3's error as its argument, and that has its own as its reason.
        arguments = [one for one in inner.args if isinstance(one, BaseException)]
        reason = getattr(inner, "reason", None)
        inner = reason or inner.__cause__ or inner.__context__ or next(iter(arguments), None)
