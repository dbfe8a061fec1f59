"""What all request bodies have in common: strict types, no unknown fields, errors that cost no more than the body."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

__all__ = ["Body", "Items", "Part", "few_fields", "place_of", "refused"]

_MOST_FIELDS = 256
_REFUSED = "refused"

T = TypeVar("T")

Items = Annotated[list[T], Field(fail_fast=True)]
"""A list of which only the first wrong item is told: a million of them would take seconds to put into words."""


def few_fields(most: int = _MOST_FIELDS) -> BeforeValidator:
    """Bounds an object's fields before they are looked at one by one, since each may be an error of its own:
    ``Annotated[dict[str, str], few_fields()]``."""

    def few(fields: Any) -> Any:
        if isinstance(fields, dict) and len(fields) > most:
            raise ValueError(f"it has {len(fields)} fields, and {most} are more than enough")
        return fields

    return BeforeValidator(few)


def refused(field: str, message: str) -> PydanticCustomError:
    """The error of a check between fields, to be raised; it is told to be of this one."""
    return PydanticCustomError(_REFUSED, "{message}", {"message": message, "field": field})


def place_of(error: Mapping[str, Any]) -> tuple[int | str, ...]:
    """Where in a body one of pydantic's errors is."""
    named = (error["ctx"]["field"],) if error["type"] == _REFUSED else ()
    return (*error["loc"], *named)


class Part(BaseModel):
    """Types are not converted; a field of another name, NaN and infinity are errors: no slip goes unseen."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


class Body(Part):
    """A whole body, whose texts are looked through once."""

    @model_validator(mode="before")
    @classmethod
    def _whole_characters(cls, body: Any) -> Any:
        if isinstance(body, dict) and len(body) > _MOST_FIELDS:
            raise ValueError(f"it has {len(body)} fields, and {_MOST_FIELDS} are more than enough")
        # JSON can spell half of a character, which no file, tokenizer, database or answer can hold.
        try:
            json.dumps(body, ensure_ascii=False, default=str).encode()
        except UnicodeEncodeError as error:
            raise ValueError("a text in it holds half of a surrogate pair, which is no character") from error
        except RecursionError as error:
            raise ValueError("it is nested too deeply") from error
        return body
