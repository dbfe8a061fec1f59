"""What an answer means: its JSON, or the error that the wire contract maps it to, with no secret in it."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import (
    APIError,
    AuthenticationError,
    MechanexError,
    NotFoundError,
    RateLimitError,
    ValidationError,
)

__all__ = ["Answer", "error_of", "json_of", "retry_after", "say_more", "without_secrets"]

_KINDS: dict[int, type[MechanexError]] = {
    400: ValidationError,
    401: AuthenticationError,
    403: AuthenticationError,
    404: NotFoundError,
    422: ValidationError,
    429: RateLimitError,
}
_MOST_SHOWN = 500
_HIDDEN = "***"
_SHORTEST_IN_TEXT = 6


@dataclass(frozen=True, repr=False)
class Answer:
    """An HTTP answer that has arrived whole.

    Attributes:
        status: the status code.
        reason: the phrase beside it, as sent.
        headers: names in any case.
        body: decoded from its transfer and content encodings.
        request_id: names the call in the server's log.
    """

    status: int
    reason: str
    headers: Mapping[str, str]
    body: bytes
    request_id: str


def json_of(answer: Answer, secrets: tuple[str, ...] = ()) -> Any:
    """The answer's JSON; None for an empty body. ``secrets`` that a header quotes are masked in the error.

    Raises:
        APIError: the body isn't JSON: cut off, or another program's page.
    """
    if not answer.body.strip():
        return None
    try:
        return json.loads(answer.body)
    except (ValueError, RecursionError) as error:
        problem = (
            f"{error.msg} at character {error.pos}"
            if isinstance(error, json.JSONDecodeError)
            else "unreadable"
        )
        kind = without_secrets(answer.headers.get("content-type", "no content type"), secrets)
    raise APIError(
        f"the server's answer is not JSON ({problem}; {kind}, {len(answer.body):,} bytes): is the base URL that "
        "of an Axionic server, and is there a proxy or log-in page in between?",
        answer.status,
        request_id=without_secrets(answer.request_id, secrets),
    )


def error_of(answer: Answer, secrets: tuple[str, ...] = ()) -> MechanexError:
    """The exception for an answer that isn't a success; ``secrets`` that it quotes are masked."""
    details: Any
    try:
        details = json.loads(answer.body)
    except (ValueError, RecursionError):
        details = answer.body.decode("utf-8", "replace") or None
    # Before anything is cut: half a key is a secret too.
    details = without_secrets(details, secrets)
    if isinstance(details, str):
        details = details[:_MOST_SHOWN]
    message = without_secrets(_message(details) or _default(answer), secrets)
    request_id = without_secrets(answer.request_id, secrets)
    if answer.status == 429:
        return RateLimitError(message, 429, details, retry_after(answer.headers), request_id=request_id)
    kind = _KINDS.get(answer.status, APIError)
    return kind(message, answer.status, details, request_id=request_id)


def say_more(error: MechanexError, hint: str) -> None:
    """Goes on with a sentence after the error's message, whose own end may be missing."""
    end = "" if error.message.endswith((".", "?", "!")) else "."
    error.message = f"{error.message}{end} {hint}"
    error.args = (error.message,)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that ``Retry-After`` asks for; a date counts from the server's own clock. None where unreadable."""
    text = headers.get("retry-after", "").strip()
    if text.isascii() and text.isdigit():
        return float(text[:9])
    until = _moment(text)
    if until is None:
        return None
    now = _moment(headers.get("date", ""))
    return max(0.0, until - (time.time() if now is None else now))


def _moment(date: str) -> float | None:
    from email.utils import parsedate_to_datetime

    try:
        return parsedate_to_datetime(date).timestamp()
    except (TypeError, ValueError, OverflowError):
        return None


def without_secrets(found: Any, secrets: tuple[str, ...]) -> Any:
    """The same JSON or text with the secrets that it quotes masked."""
    if not secrets:
        return found
    if isinstance(found, str):
        if found in secrets:
            return _HIDDEN
        for secret in secrets:
            # A short password would take ordinary words apart; what quotes it alone is masked above.
            found = found.replace(secret, _HIDDEN) if len(secret) >= _SHORTEST_IN_TEXT else found
        return found
    if isinstance(found, list):
        return [without_secrets(item, secrets) for item in found]
    if isinstance(found, dict):
        return {without_secrets(key, secrets): without_secrets(item, secrets) for key, item in found.items()}
    return found


def _message(details: Any) -> str:
    """FastAPI's ``detail`` (a text, or a list of problems) or OpenAI's ``error.message``."""
    if not isinstance(details, dict):
        return ""
    error = details.get("error")
    found = details.get("detail") or (error.get("message") if isinstance(error, dict) else error)
    if isinstance(found, list):
        return "; ".join(map(_problem, found))[: 4 * _MOST_SHOWN]
    if isinstance(found, dict):
        found = found.get("message") or json.dumps(found)
    return str(found)[: 4 * _MOST_SHOWN] if found else ""


def _problem(problem: Any) -> str:
    if not isinstance(problem, dict):
        return str(problem)
    path = problem.get("loc")
    place = ".".join(str(part) for part in path if part != "body") if isinstance(path, list) else ""
    text = str(problem.get("msg", problem))
    return f"{place}: {text}" if place else text


def _default(answer: Answer) -> str:
    if 300 <= answer.status < 400:
        where = answer.headers.get("location", "").partition("?")[0]
        return (
            f"the server redirects to {where or 'another address'}, and calls with keys aren't sent on: set "
            "base_url to it."
        )
    reason = answer.reason or "no reason given"
    kind = answer.headers.get("content-type", "").partition(";")[0]
    what = f", with {kind} and no 'detail'" if kind and answer.body else ""
    return f"the server answered {reason}{what}."
