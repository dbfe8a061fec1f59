"""The connections to servers: which calls over them are tried again, and why one got no answer."""

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
from .answers import retry_after
from .deadline import DeadlineAdapter, GivenUp, is_timed, left

__all__ = ["FAILURES", "new_session", "reason_of"]

_logger = logging.getLogger(__name__)

FAILURES = (GivenUp, requests.RequestException, urllib3.exceptions.HTTPError, OSError)
"""What a request over a session of ``new_session`` may raise within ``until``."""

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
            raise MaxRetryError(facts["_pool"], str(url), error) from error
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
        status_forcelist=(429, 502, 503, 504),
        backoff_factor=0.25,
        backoff_jitter=0.25,
        backoff_max=8.0,
        raise_on_status=False,
    )
    adapter = DeadlineAdapter(pool_connections=4, pool_maxsize=32, max_retries=retries)
    for scheme in ("https://", "http://"):
        session.mount(scheme, adapter)
    return session


def reason_of(error: BaseException) -> str:
    """Why no whole answer came; the text may quote a secret."""
    if isinstance(error, GivenUp):
        return str(error)
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
    inner: BaseException | None = error
    while inner is not None:
        yield inner
        inner = inner.__cause__ or inner.__context__
