"""What an answer means: the fields that the wire contract promises, or the error that it is, with no secret in it."""

from __future__ import annotations

import gzip
import io
import json
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

from ..errors import (
    APIError,
    AuthenticationError,
    MechanexError,
    NotFoundError,
    RateLimitError,
    ValidationError,
)

__all__ = [
    "DEEPEST",
    "Answer",
    "UnexpectedAnswer",
    "check_understood",
    "error_of",
    "field",
    "json_of",
    "listed",
    "names",
    "object_of",
    "parsed",
    "retry_after",
    "say_more",
    "unpacked",
    "without_secrets",
]

T = TypeVar("T")

_KINDS: dict[int, type[MechanexError]] = {
    400: ValidationError,
    401: AuthenticationError,
    403: AuthenticationError,
    404: NotFoundError,
    422: ValidationError,
    429: RateLimitError,
}
DEEPEST = 100
"""Lists and objects within each other in an answer's JSON; none of ours has ten."""

_PIECE = 2**20
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
        return parsed(answer.body)
    except ValueError as error:
        problem = (
            f"{error.msg} at character {error.pos}"
            if isinstance(error, json.JSONDecodeError)
            else str(error)
            if isinstance(error, NoJson)
            else "unreadable"
        )
        kind = without_secrets(answer.headers.get("content-type", "no content type"), secrets)
    raise APIError(
        f"the server's answer is not JSON ({problem}; {kind}, {len(answer.body):,} bytes): is the base URL that "
        "of an Axionic server, and is there a proxy or log-in page in between?",
        answer.status,
        request_id=without_secrets(answer.request_id, secrets),
    )


class NoJson(ValueError):
    """What the parser takes and JSON, or a program that works on it, doesn't."""


def parsed(body: bytes) -> Any:
    """The JSON of a body, which nests no deeper than programs can follow.

    Raises:
        ValueError: it is no JSON, or has NaN or an infinity, which JSON hasn't, or nests more than ``DEEPEST`` deep.
    """
    try:
        found = json.loads(body, parse_constant=_no_number)
    except RecursionError:
        raise NoJson(f"it nests more than {DEEPEST} deep") from None
    level, depth = [found], 0
    while level := [one for one in level if isinstance(one, (dict, list))]:
        depth += 1
        if depth > DEEPEST:
            raise NoJson(f"it nests more than {DEEPEST} deep")
        level = [inner for one in level for inner in (one.values() if isinstance(one, dict) else one)]
    return found


def unpacked(body: bytes, encoding: str, most_bytes: int) -> bytes:
    """A body without the content encoding that it was sent in, though none was asked for.

    Args:
        body: as it was sent.
        encoding: the header ``Content-Encoding``.
        most_bytes: that it may unpack to.

    Raises:
        APIError: it has more bytes, is damaged, or is packed in a way that isn't gzip or deflate.
    """
    named = encoding.strip().lower()
    if named in ("", "identity") or not body:
        return body
    if named not in ("gzip", "x-gzip", "deflate"):
        raise APIError(f"the server's answer is packed as {named[:40]!r}, which it wasn't asked for.")
    try:
        found = (_inflated if named == "deflate" else _gunzipped)(body, most_bytes + 1)
    except EOFError:
        raise APIError("the server's answer is packed, and cut off.") from None
    except (OSError, zlib.error) as error:
        raise APIError(f"the server's answer is packed, and damaged ({error}).") from error
    if len(found) > most_bytes:
        raise APIError(
            f"the server's answer unpacks to more than {most_bytes:,} bytes: give the client a larger max_answer_bytes."
        )
    return found


def _gunzipped(body: bytes, most: int) -> bytes:
    """The first bytes of what gzip packed, in however many members."""
    found = bytearray()
    with gzip.GzipFile(fileobj=io.BytesIO(body)) as file:
        while len(found) < most and (piece := file.read(min(most - len(found), _PIECE))):
            found += piece
    return bytes(found)


def _inflated(body: bytes, most: int) -> bytes:
    """The first bytes of what is packed as deflate: in zlib's envelope, or as some servers send it without."""
    unpacker = zlib.decompressobj()
    try:
        found = unpacker.decompress(body, most)
    except zlib.error:
        unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
        found = unpacker.decompress(body, most)
    if len(found) < most and not unpacker.eof:
        raise EOFError
    return found


def _no_number(name: str) -> Any:
    raise NoJson(f"{name} is no number of JSON")


def _printable(text: str) -> str:
    """The text with halves of surrogate pairs, which can't be printed, written out."""
    return text.encode("utf-8", "backslashreplace").decode()


def error_of(answer: Answer, secrets: tuple[str, ...] = ()) -> MechanexError:
    """The exception for an answer that isn't a success; ``secrets`` that it quotes are masked."""
    details: Any
    try:
        details = parsed(answer.body)
    except ValueError:
        details = answer.body.decode("utf-8", "replace") or None
    # Before anything is cut: half a key is a secret too.
    details = without_secrets(details, secrets)
    if isinstance(details, str):
        details = details[:_MOST_SHOWN]
    message = _printable(without_secrets(_message(details) or _default(answer), secrets))
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


class UnexpectedAnswer(APIError):
    """An answer that came whole, and isn't what the wire contract says."""


def object_of(answer: Any, call: str) -> dict[str, Any]:
    """The answer, which must be an object.

    Raises:
        APIError: it is something else.
    """
    if not isinstance(answer, dict):
        raise UnexpectedAnswer(
            f"{call}: the server's answer is {_kind(answer)}, and an object is expected.",
            details=_shape(answer),
        )
    return answer


def field(answer: Any, call: str, kind: type[T], *names: str) -> T:
    """The first of these fields that the answer has.

    Raises:
        APIError: it has none of them, or of another kind.
    """
    found = (
        next((answer[name] for name in names if name in answer), None) if isinstance(answer, dict) else None
    )
    if not isinstance(found, kind):
        wanted = " or ".join(map(repr, names))
        raise UnexpectedAnswer(
            f"{call}: the server's answer has no {wanted} of type {kind.__name__}: is it an Axionic server of "
            "this version?",
            details=_shape(answer),
        )
    return found


def check_understood(answer: Any, call: str, fields: Sequence[str]) -> None:
    """Refuses the answer of a server that knows the contract alone and has taken no heed of further fields.

    Args:
        answer: has a ``finish_reason`` where they were understood.
        call: the call's documented name.
        fields: that were sent beyond the contract's; none is always understood.

    Raises:
        APIError: it hasn't.
    """
    if fields and not (isinstance(answer, dict) and "finish_reason" in answer):
        raise UnexpectedAnswer(
            f"{call}: the server's answer has no 'finish_reason', so that it doesn't know {', '.join(fields)}: leave "
            "them out, or use a server of this version, or set_execution_mode('local').",
            details=_shape(answer),
        )


def listed(answer: Any, call: str, name: str) -> list[Any]:
    """The answer itself if it is a list, else its field of this name."""
    return answer if isinstance(answer, list) else field(answer, call, list, name)


def names(answer: Any, call: str) -> list[str]:
    """The names in a list of models, each a text or an object with ``name`` (or ``id``).

    Raises:
        APIError: an entry without one.
    """
    return [
        one if isinstance(one, str) else field(one, call, str, "name", "id")
        for one in listed(answer, call, "models")
    ]


def _shape(answer: Any) -> Any:
    """What the answer is made of, without its contents: one of an unexpected shape may hold a key anywhere."""
    if isinstance(answer, dict):
        return {name: _kind(value) for name, value in answer.items()}
    return _kind(answer)


def _kind(answer: Any) -> str:
    return "empty" if answer is None else f"a {type(answer).__name__}"
