"""Reads the answers of the wire contract, in either of their shapes; an answer without what it promises is an error."""

from __future__ import annotations

from typing import Any, TypeVar

from ..errors import APIError

__all__ = ["UnexpectedAnswer", "field", "listed", "names", "object_of"]

T = TypeVar("T")


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
