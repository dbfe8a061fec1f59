"""The fields of a body that say what an answer is held to, in whatever API it is asked for."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from ...engine.answering import (
    MOST_BIAS,
    MOST_BIASES,
    MOST_PENALTY,
    MOST_REPETITION,
    MOST_STOP_IDS,
    AnswerRules,
)
from ...engine.decode.request import TextRequest
from ..http.body import Items, few_fields, refused
from .structured import FormFields, form_of

if TYPE_CHECKING:
    from .engine import ServingEngine

__all__ = ["LENGTHS", "RuleFields", "Stop", "TokenIds", "Whole", "held_to"]


def _whole(number: Any) -> Any:
    return int(number) if isinstance(number, float) and number.is_integer() else number


Whole = Annotated[int, BeforeValidator(_whole)]
"""A whole number, which some clients write as ``5.0``."""


def _wholes(numbers: Any) -> Any:
    few = isinstance(numbers, list) and len(numbers) <= _MOST_CONVERTED
    return [_whole(one) for one in numbers] if few and float in set(map(type, numbers)) else numbers


TokenIds = Annotated[Items[int], BeforeValidator(_wholes)]
"""Token ids, which may be written as ``5.0``."""

Stop = Annotated[str, Field(min_length=1, max_length=1000)]
"""A text that ends an answer."""

_MOST_CONVERTED = 100_000  # one by one, on the event loop

LENGTHS = ("max_completion_tokens", "max_tokens", "max_new_tokens")
"""The fields by which bodies say how long an answer may be."""

_RULES = (
    "min_tokens",
    "ignore_eos",
    "stop_token_ids",
    "include_stop_str_in_output",
    "skip_special_tokens",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
    "logit_bias",
)


class RuleFields(FormFields):
    """What an answer is held to: its ends, penalties, biases and form."""

    stop_token_ids: Annotated[Items[Whole], Field(max_length=MOST_STOP_IDS)] | None = Field(
        default=None, description="Further tokens that end an answer."
    )
    include_stop_str_in_output: bool | None = Field(
        default=False, description="Whether the stop text or token stays in the answer."
    )
    ignore_eos: bool | None = Field(
        default=False, description="Go on behind the model's own end tokens, to max_tokens."
    )
    min_tokens: Whole | None = Field(
        default=0, ge=0, le=2**31, description="Tokens before which nothing ends an answer."
    )
    skip_special_tokens: bool | None = Field(
        default=True, description="Whether special tokens are left out of the text."
    )
    repetition_penalty: float | None = Field(
        default=1.0, gt=0, le=MOST_REPETITION, description="Of tokens that prompt or answer have; 1 for none."
    )
    frequency_penalty: float | None = Field(default=0.0, ge=-MOST_PENALTY, le=MOST_PENALTY)
    presence_penalty: float | None = Field(default=0.0, ge=-MOST_PENALTY, le=MOST_PENALTY)
    logit_bias: (
        Annotated[dict[str, Annotated[float, Field(ge=-MOST_BIAS, le=MOST_BIAS)]], few_fields(MOST_BIASES)]
        | None
    ) = None

    @model_validator(mode="after")
    def _reachable(self) -> RuleFields:
        most = self.most_tokens
        if most is not None and (self.min_tokens or 0) > most:
            raise refused("min_tokens", f"min_tokens is at most max_tokens: got {self.min_tokens} and {most}")
        return self

    @property
    def most_tokens(self) -> int | None:
        """How long an answer may be; None for as long as there is room."""
        return next((n for name in LENGTHS if (n := getattr(self, name, None)) is not None), None)

    @property
    def rules(self) -> AnswerRules:
        """What was asked, checked; the form aside.

        Raises:
            ValidationError: what no answer can be held to, with the field as ``param``.
        """
        return AnswerRules(**{name: one for name in _RULES if (one := getattr(self, name)) is not None})


async def held_to(engine: ServingEngine, body: RuleFields, request: TextRequest) -> TextRequest:
    """The request with what the body holds its answer to.

    Raises:
        ValidationError: what no answer can be held to, token ids that the model doesn't have, or a form that can't be
            followed, with the field as ``param``.
    """
    rules = body.rules
    rules.check_ids(engine.adapter)
    return replace(rules.asked(request), grammar=await form_of(engine, body))
