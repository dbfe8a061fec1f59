"""The library's errors as HTTP answers: OpenAI's envelope under /v1, ``{"detail": …}`` elsewhere."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from ...errors import (
    APIError,
    AuthenticationError,
    MechanexError,
    NotFoundError,
    RateLimitError,
    ValidationError,
)
from .body import place_of

__all__ = [
    "INTERNAL",
    "add_handlers",
    "answer_to",
    "anthropic_envelope",
    "error_answer",
    "error_envelope",
    "invalid",
    "status_of",
]

_logger = logging.getLogger(__name__)
_TYPES = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error"}
_CODES = {401: "invalid_api_key", 429: "rate_limit_exceeded", 503: "server_unavailable", 504: "timeout"}
_HTTP_CODES = {404: "unknown_url", 405: "method_not_allowed", 413: "request_too_large"}

INTERNAL = "The server failed; its log has more under this request's id."


_ANTHROPIC = "/v1/messages"
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
_OPENAI = frozenset({"/tokenize", "/detokenize"})  # beside /v1, as vLLM has them


def invalid(message: str, param: str | None, code: str | None = None) -> ValidationError:
    """The error of a field that can't be honoured."""
    return ValidationError(message, 400, {"param": param, "code": code})


def status_of(error: MechanexError) -> int:
    """The HTTP status that an error asks for, or that its kind has."""
    if error.status_code is not None and 400 <= error.status_code <= 599:
        return error.status_code
    kinds: list[tuple[type[MechanexError], int]] = [
        (ValidationError, 400),
        (NotFoundError, 404),
        (AuthenticationError, 401),
        (RateLimitError, 429),
        (APIError, 500),
    ]
    return next((status for kind, status in kinds if isinstance(error, kind)), 500)


def _envelope(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """OpenAI's error object."""
    kind = _TYPES.get(status)
    if kind is None:
        kind = "rate_limit_error" if status == 429 else "server_error" if status >= 500 else _TYPES[400]
    return {"error": {"message": message, "type": kind, "param": param, "code": code or _CODES.get(status)}}


def error_envelope(error: MechanexError, public: Callable[[str], str] = str) -> dict[str, Any]:
    """OpenAI's error object for one of the library's errors.

    Args:
        error: the error.
        public: makes its message one for clients.
    """
    details = error.details if isinstance(error.details, dict) else {}
    return _envelope(status_of(error), public(error.message), details.get("param"), details.get("code"))


def anthropic_envelope(error: MechanexError, public: Callable[[str], str] = str) -> dict[str, Any]:
    """Anthropic's error object for one of the library's errors; arguments as ``error_envelope``."""
    return _anthropic(status_of(error), public(error.message))


def _anthropic(status: int, message: str) -> dict[str, Any]:
    kind = _ANTHROPIC_TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": message}}


def add_handlers(app: FastAPI) -> None:
    """Makes every error of the application an answer in the form that its path promises."""

    @app.exception_handler(MechanexError)
    async def ours(request: Request, error: MechanexError) -> JSONResponse:
        return answer_to(request, error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        # What was sent is left out: it may be large, secret, or no JSON (NaN).
        found = [
            {
                "loc": [str(part)[:100] for part in place_of(one)],
                # What a check of ours says has pydantic's word before it.
                "msg": str(one["msg"]).removeprefix("Value error, ")[:500],
                "type": one["type"],
            }
            for one in error.errors()[:20]
        ]
        if not _openai(request):
            return JSONResponse({"detail": _encodable(found)}, 422)
        return error_answer(request, 400, *_explained(found))

    @app.exception_handler(HTTPException)
    async def plain(request: Request, error: HTTPException) -> JSONResponse:
        message = str(error.detail)
        if error.status_code == 404:
            message = f"There is nothing at {request.method} {_path(request)[:200]}."
        code, headers = _HTTP_CODES.get(error.status_code), dict(error.headers or {})
        return error_answer(request, error.status_code, message, None, code, headers)


def answer_to(request: Request, error: MechanexError) -> JSONResponse:
    """The answer that one of the library's errors is."""
    status, headers = status_of(error), {}
    if status >= 500:
        _logger.error("%s %s: %s", request.method, _path(request), error.message)
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, RateLimitError) and error.retry_after is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    details = error.details if isinstance(error.details, dict) else {}
    # A request may be ended before an application has it.
    state = getattr(request.scope.get("app"), "state", None)
    public: Callable[[str], str] = getattr(state, "public", str)
    message = public(error.message)
    return error_answer(request, status, message, details.get("param"), details.get("code"), headers)


def error_answer(
    request: Request,
    status: int,
    message: str,
    param: str | None = None,
    code: str | None = None,
    headers: dict[str, str] | None = None,
) -> JSONResponse:
    """An error in the form that the request's path promises."""
    if _path(request).startswith(_ANTHROPIC):
        body = _anthropic(status, message)
    else:
        body = _envelope(status, message, param, code) if _openai(request) else {"detail": message}
    return JSONResponse(_encodable(body), status, headers)


def _openai(request: Request) -> bool:
    path = _path(request)
    return path.startswith("/v1/") or path in _OPENAI


def _path(request: Request) -> str:
    """As it came: ``request.url`` may have in it what the client calls the host."""
    return str(request.scope["path"])


def _encodable(value: Any) -> Any:
    """The same with every text fit for UTF-8: a request may hold half of a surrogate pair."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, dict):
        return {key: _encodable(one) for key, one in value.items()}
    return [_encodable(one) for one in value] if isinstance(value, list) else value


def _explained(found: list[dict[str, Any]]) -> tuple[str, str | None, str | None]:
    """What a body that the schema refuses is told: what was wrong, in which field, and a code."""
    first = found[0] if found else {"loc": [], "msg": "invalid", "type": ""}
    names = [part for part in first["loc"] if part != "body"]
    if first["type"] in ("json_invalid", "missing") and not names:
        return f"The body must be a JSON object ({first['msg']}).", None, None
    if first["type"] in ("model_attributes_type", "model_type") and not names:
        return "The body must be a JSON object, with 'Content-Type: application/json'.", None, None
    if first["type"] == "json_invalid":
        return "The body is not valid JSON.", None, None
    param = names[0] if names else None
    if first["type"] == "extra_forbidden":
        return f"Unrecognized request argument supplied: {'.'.join(names)}", param, "unknown_parameter"
    if first["type"] == "missing":
        return f"'{'.'.join(names)}' is required.", param, "missing_required_parameter"
    same = [one["msg"] for one in found if [part for part in one["loc"] if part != "body"][:1] == names[:1]]
    where = f"'{param}'" if param else "the body"
    reasons = "; or ".join(list(dict.fromkeys(same))[:4])
    return f"Invalid value for {where}: {reasons}.", param, "invalid_value"
