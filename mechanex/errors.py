"""Every exception that the library raises on purpose."""

from __future__ import annotations

from typing import Any

__all__ = [
    "APIError",
    "AuthenticationError",
    "MechanexError",
    "NotFoundError",
    "RateLimitError",
    "ValidationError",
]


class MechanexError(Exception):
    """Base exception for the Mechanex library.

    Args:
        message: what was wrong, what was got, and what to do about it.
        status_code: HTTP status, when the error came over HTTP.
        details: the decoded body of the answer, or other machine-readable context.
        request_id: names the call in the server's log, when the error came over HTTP.
    """

    def __init__(
        self,
        message: str,
        status_code: int | None = None,
        details: Any = None,
        *,
        request_id: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status_code = status_code
        self.details = details
        self.request_id = request_id

    def __str__(self) -> str:
        return self.message if self.status_code is None else f"[{self.status_code}] {self.message}"


class AuthenticationError(MechanexError):
    """Raised when authentication fails."""


class APIError(MechanexError):
    """Raised when the API returns an error or can't be reached."""


class NotFoundError(MechanexError):
    """Raised when a resource is not found."""


class RateLimitError(MechanexError):
    """Raised when rate limits are exceeded.

    Args:
        retry_after: seconds to wait before the next try, when the server named them.
    """

    def __init__(
        self,
        message: str,
        status_code: int | None = None,
        details: Any = None,
        retry_after: float | None = None,
        *,
        request_id: str | None = None,
    ) -> None:
        super().__init__(message, status_code, details, request_id=request_id)
        self.retry_after = retry_after


class ValidationError(MechanexError, ValueError):
    """Raised when an argument or a request is invalid. Also a ``ValueError``."""
