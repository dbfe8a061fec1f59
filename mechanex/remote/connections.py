"""The connections to servers, which are kept, and one request over them: a whole answer, or why there is none."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from .._version import __version__
from .address import Address
from .failures import Answer
from .identity import Credentials

if TYPE_CHECKING:
    import requests

__all__ = ["ConnectionFailed", "Connections"]

_CONNECT_TIMEOUT = 10.0
_MOST_BYTES = 256 << 20
_TOO_SLOW = "no answer in time: the server is slow or stuck; give the client a longer timeout"


class ConnectionFailed(Exception):
    """No whole answer came; says why. ``again``: another try may help before the time is over."""

    def __init__(self, reason: str, *, again: bool) -> None:
        super().__init__(reason)
        self.again = again


class Connections:
    """A pool of connections, safe under threads; nothing is opened before the first request."""

    def __init__(self) -> None:
        self._session: requests.Session | None = None
        self._pid = 0
        self._lock = threading.Lock()

    def request(
        self,
        method: str,
        server: Address,
        path: str,
        data: bytes | None,
        used: Credentials,
        deadline: float,
        request_id: str,
    ) -> Answer:
        """Sends a request and reads the answer to its end.

        Args:
            method: ``GET``, ``POST`` or ``DELETE``.
            server: where to.
            path: below the server's URL, with a slash in front.
            data: JSON, or None.
            used: credentials to send.
            deadline: on the clock of ``time.monotonic``.
            request_id: names the call in the server's log.

        Raises:
            ConnectionFailed: no whole answer came in time.
        """
        import ssl

        import requests
        import urllib3

        from .timed import until

        left = deadline - time.monotonic()
        if left <= 0:
            raise ConnectionFailed(
                "the time for this call is over; give the client a longer timeout", again=False
            )
        headers = {"Accept": "application/json", "x-request-id": request_id}
        if data is not None:
            headers["Content-Type"] = "application/json"
        reason = None
        again = True
        try:
            with (
                until(deadline),
                self._opened().request(
                    method,
                    server.url + path,
                    data=data,
                    headers=headers,
                    auth=_signed(used),
                    timeout=(min(left, _CONNECT_TIMEOUT), left),
                    allow_redirects=False,
                    stream=True,
                    # Proxies are for other machines; one that sees loopback calls would see their keys.
                    proxies=dict.fromkeys(("http", "https", "all"), "") if server.is_loopback else None,
                ) as response,
            ):
                body = _body(response, deadline)
                their_id = response.headers.get("x-request-id") or request_id
                return Answer(response.status_code, response.reason or "", response.headers, body, their_id)
        except requests.exceptions.ConnectTimeout:
            reason = "no connection in time: is the server's address right, and is it up?"
        except (requests.exceptions.Timeout, urllib3.exceptions.TimeoutError):
            reason, again = _TOO_SLOW, False
        except (requests.exceptions.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
            causes = list(_causes(error))
            # A handshake that is cut off says nothing about who is there.
            cut = any(isinstance(one, (ssl.SSLEOFError, ssl.SSLZeroReturnError)) for one in causes)
            if any(isinstance(one, TimeoutError) for one in causes):
                reason, again = _TOO_SLOW, False
            elif isinstance(error, requests.exceptions.SSLError) and not cut:
                reason, again = f"the connection is not secure ({_told(causes[-1])})", False
            else:
                why = _told(causes[-1])
                reason = f"the connection failed ({why}): is the server's address right, and is it up?"
        raise ConnectionFailed(reason, again=again)

    def close(self) -> None:
        """Closes what is open; a later request opens anew."""
        with self._lock:
            session, self._session = self._session, None
        if session is not None:
            session.close()

    def _opened(self) -> requests.Session:
        with self._lock:
            # After a fork, the parent's sockets are not the child's to use.
            if self._session is None or self._pid != os.getpid():
                self._session, self._pid = _session(), os.getpid()
            return self._session


def _session() -> requests.Session:
    from http.cookiejar import DefaultCookiePolicy

    import requests

    from .timed import TimedAdapter

    session = requests.Session()
    session.headers["User-Agent"] = f"mechanex/{__version__}"
    session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
    adapter = TimedAdapter(pool_connections=4, pool_maxsize=32, max_retries=0)
    for scheme in ("https://", "http://"):
        session.mount(scheme, adapter)
    return session


def _signed(used: Credentials) -> Callable[[requests.PreparedRequest], requests.PreparedRequest]:
    """Puts the credentials into the headers. As ``auth``, so that requests doesn't put those of ~/.netrc there."""

    def sign(request: requests.PreparedRequest) -> requests.PreparedRequest:
        if used.api_key is not None:
            request.headers["x-api-key"] = used.api_key
        if used.access_token is not None:
            request.headers["Authorization"] = f"Bearer {used.access_token}"
        return request

    return sign


def _body(response: requests.Response, deadline: float) -> bytes:
    """The whole body; the connection keeps to the deadline, and what is decoded from little may take long too."""
    pieces, size = [], 0
    read = getattr(response.raw, "read1", response.raw.read)  # urllib3 1 has no read1
    while piece := read(1 << 16, decode_content=True):
        pieces.append(piece)
        size += len(piece)
        if size > _MOST_BYTES:
            raise ConnectionFailed(f"the answer has more than {_MOST_BYTES:,} bytes", again=False)
        if time.monotonic() > deadline:
            raise ConnectionFailed(
                "the answer comes too slowly; give the client a longer timeout", again=False
            )
    return b"".join(pieces)


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


def _told(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
