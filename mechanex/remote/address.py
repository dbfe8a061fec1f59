"""Where the server is, and whether secrets may travel there."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass
from urllib.parse import urlsplit

from ..errors import ValidationError

__all__ = ["PUBLIC_BACKEND", "Address", "address", "origin_of"]

PUBLIC_BACKEND = "https://axionic-backend-prod-594546489999.us-east4.run.app"


@dataclass(frozen=True)
class Address:
    """A server's base URL.

    Attributes:
        url: without a slash at its end.
        origin: scheme, host and port: what credentials belong to.
        chosen: whether the environment or an argument named it; the public backend otherwise.
    """

    url: str
    origin: str
    chosen: bool

    @property
    def host(self) -> str:
        """The host's name or address."""
        return urlsplit(self.url).hostname or ""

    @property
    def is_loopback(self) -> bool:
        """Whether what is sent stays on this machine."""
        if self.host == "localhost" or self.host.endswith(".localhost"):
            return True
        try:
            found = ipaddress.ip_address(self.host)
        except ValueError:
            return False
        return found.is_loopback or found.is_unspecified

    def check_secrets(self, allow_http: bool) -> None:
        """Refuses to send credentials where the network could read them.

        Raises:
            ValidationError: plain http to another machine, unless it is allowed.
        """
        if self.url.startswith("https:") or self.is_loopback:
            return
        if not allow_http and os.environ.get("MECHANEX_ALLOW_HTTP") != "1":
            raise ValidationError(
                f"{self.origin} is plain http on another machine, where anyone on the way can read keys and "
                "passwords: use https, or allow it with Mechanex(allow_http=True) or MECHANEX_ALLOW_HTTP=1."
            )


def address(base_url: str | None = None) -> Address:
    """The server to talk to: ``MECHANEX_BASE_URL``, else ``base_url``, else the public backend.

    Raises:
        ValidationError: not an http or https URL, or one with a user name, a query or a fragment.
    """
    chosen = os.environ.get("MECHANEX_BASE_URL") or base_url
    source = "MECHANEX_BASE_URL" if os.environ.get("MECHANEX_BASE_URL") else "base_url"
    if not chosen:
        return _parsed(PUBLIC_BACKEND, source, chosen=False)
    if not isinstance(chosen, str):
        raise ValidationError(f"{source} is a text; got {type(chosen).__name__}.")
    return _parsed(chosen.strip(), source, chosen=True)


def origin_of(base_url: str) -> str:
    """The scheme, host and port of a server's URL, in the form that credentials are kept under.

    Raises:
        ValidationError: as in ``address``.
    """
    return _parsed(base_url.strip(), "base_url", chosen=True).origin


def _parsed(url: str, source: str, *, chosen: bool) -> Address:
    # The text itself stays out of the messages: it may be a key that was given in the wrong place.
    try:
        parts = urlsplit(url)
        sound = parts.scheme.lower() in ("http", "https") and parts.hostname and url.isprintable()
        port = parts.port
    except ValueError:
        sound = False
    if not sound:
        raise ValidationError(
            f"{source} is not an http or https URL: give one such as {PUBLIC_BACKEND} or http://127.0.0.1:8000."
        )
    if parts.username is not None or parts.query or parts.fragment:
        raise ValidationError(
            f"{source} holds a user name, a query or a fragment: give scheme, host, port and path only, and "
            "credentials through set_key, login or MECHANEX_API_KEY."
        )
    scheme, name = parts.scheme.lower(), str(parts.hostname).lower()
    host = f"[{name}]" if ":" in name else name
    default = 443 if scheme == "https" else 80
    origin = f"{scheme}://{host}" + (f":{port}" if port not in (None, default) else "")
    return Address(origin + parts.path.rstrip("/"), origin, chosen)
