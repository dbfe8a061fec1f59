"""What an answer is held to beside how its tokens are drawn: its ends, penalties, biases and form.

Names and ranges are those of OpenAI's and vLLM's request bodies, in Python, in commands and over HTTP.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal, TypedDict, get_args

from ..errors import ValidationError
from .whole import as_whole

if TYPE_CHECKING:
    from .decode.request import TextRequest
    from .models.adapter import ModelAdapter

__all__ = [
    "MOST_BIAS",
    "MOST_BIASES",
    "MOST_PENALTY",
    "MOST_REPETITION",
    "MOST_STOP_IDS",
    "RULES",
    "AnswerRules",
    "Form",
    "FormKind",
    "RuleOptions",
    "check_ends",
    "forms",
    "one_form",
]

MOST_STOP_IDS = 256
MOST_BIASES = 1024
MOST_BIAS = 100.0
MOST_PENALTY = 2.0
MOST_REPETITION = 100.0

FormKind = Literal["json", "regex", "choice", "grammar"]
Form = tuple[str, FormKind, Any]
"""The argument that gives an answer's form, what kind of form it is, and what it says."""

_FORMATS = ("text", "json_object", "json_schema")


class RuleOptions(TypedDict, total=False):
    """The keyword arguments of ``AnswerRules``."""

    min_tokens: int
    ignore_eos: bool
    stop_token_ids: Sequence[int] | None
    include_stop_str_in_output: bool
    skip_special_tokens: bool
    repetition_penalty: float
    frequency_penalty: float
    presence_penalty: float
    logit_bias: Mapping[int | str, float] | None
    response_format: Mapping[str, Any] | None
    guided_json: Mapping[str, Any] | None
    guided_regex: str | None
    guided_choice: Sequence[str] | None
    guided_grammar: str | None


@dataclass(frozen=True, kw_only=True)
class AnswerRules:
    """What an answer is held to.

    Args:
        min_tokens: tokens before which no end token is chosen and no stop text ends the answer.
        ignore_eos: go on behind the model's own end tokens, to ``max_tokens``.
        stop_token_ids: further tokens that end the answer; cut off as stop texts are.
        include_stop_str_in_output: keep the stop text or token that ended the answer.
        skip_special_tokens: leave special tokens out of the text.
        repetition_penalty: divides the logits above 0 of tokens that prompt or answer have, and multiplies those below;
            above 0, at most 100.
        frequency_penalty: is taken off a token's logit for every time that the answer has it, in [-2, 2].
        presence_penalty: is taken off once for a token that the answer has, in [-2, 2].
        logit_bias: by token id what is added to its logit, in [-100, 100].
        response_format: OpenAI's ``{"type": "json_object"}``, or ``{"type": "json_schema", "json_schema": {"schema":
            …}}``.
        guided_json: a JSON schema that the answer follows.
        guided_regex: a regular expression that the whole answer matches.
        guided_choice: texts of which the answer is one.
        guided_grammar: a grammar that the answer follows, in Lark's form or as GBNF.

    Raises:
        ValidationError: an argument out of its range, or several forms; ``details`` names it as ``param``.
    """

    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: Sequence[int] | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int | str, float] | None = None
    response_format: Mapping[str, Any] | None = None
    guided_json: Mapping[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: Sequence[str] | None = None
    guided_grammar: str | None = None

    def __post_init__(self) -> None:
        least = as_whole(self.min_tokens)
        if least is None or least < 0:
            raise _wrong("min_tokens", "is a number of tokens, 0 or more", self.min_tokens)
        self._set("min_tokens", least)
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise _wrong(name, "is True or False", getattr(self, name))
        self._set("stop_token_ids", _token_ids(self.stop_token_ids))
        for name in ("frequency_penalty", "presence_penalty"):
            penalty = _number(getattr(self, name))
            if penalty is None or abs(penalty) > MOST_PENALTY:
                raise _wrong(name, f"is from {-MOST_PENALTY:g} to {MOST_PENALTY:g}", getattr(self, name))
            self._set(name, penalty)
        repetition = _number(self.repetition_penalty)
        if repetition is None or not 0 < repetition <= MOST_REPETITION:
            raise _wrong(
                "repetition_penalty",
                f"is above 0 and at most {MOST_REPETITION:g}, 1 for none",
                self.repetition_penalty,
            )
        self._set("repetition_penalty", repetition)
        self._set("logit_bias", _biases(self.logit_bias))
        self._set("response_format", _as_format(self.response_format))
        for name in ("guided_regex", "guided_grammar"):
            text = getattr(self, name)
            if text is not None and not (isinstance(text, str) and text):
                raise _wrong(name, "is a text that isn't empty", text)
        if self.guided_json is not None and not isinstance(self.guided_json, Mapping):
            raise _wrong("guided_json", "is a JSON schema, a dictionary", self.guided_json)
        self._set("guided_choice", _choice(self.guided_choice))
        if self.form is not None:
            check_ends(self.form[0], self)

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    @property
    def form(self) -> Form | None:
        """The answer's form, or None for any."""
        return one_form(forms(self, self.response_format))

    @property
    def told(self) -> dict[str, Any]:
        """What differs from the defaults, as a body has it."""
        found = {
            name: value for name, value in vars(self).items() if name in RULES and value != _DEFAULTS[name]
        }
        if "logit_bias" in found:
            found["logit_bias"] = {str(token): bias for token, bias in found["logit_bias"].items()}
        return found

    def check_ids(self, adapter: ModelAdapter) -> None:
        """Refuses token ids that the model doesn't have: a ValidationError that names the argument."""
        for name in ("logit_bias", "stop_token_ids"):
            try:
                adapter.check_token_ids(int(token) for token in getattr(self, name) or ())
            except ValidationError as error:
                raise ValidationError(
                    f"Invalid value for '{name}': {error.message}", details={"param": name}
                ) from error

    def asked(self, request: TextRequest) -> TextRequest:
        """The request held to these rules; its grammar, which needs a tokenizer, aside."""
        return replace(
            request,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            include_stop=self.include_stop_str_in_output,
            ignore_ends=self.ignore_eos,
            min_tokens=self.min_tokens,
            skip_special_tokens=self.skip_special_tokens,
            repetition_penalty=self.repetition_penalty,
            frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty,
            logit_bias=tuple((int(token), bias) for token, bias in (self.logit_bias or {}).items()),
        )


RULES = tuple(field.name for field in fields(AnswerRules))
"""The names of the arguments of ``AnswerRules``."""

_DEFAULTS = {field.name: field.default for field in fields(AnswerRules)}


def forms(given: object, wanted: Mapping[str, Any] | None) -> list[Form]:
    """All the forms that an answer is given.

    Args:
        given: has ``guided_json``, ``guided_regex``, ``guided_choice`` and ``guided_grammar``.
        wanted: OpenAI's ``response_format``, valid.
    """
    found: list[Form] = []
    if wanted is not None and wanted["type"] != "text":
        named = wanted.get("json_schema")
        found.append(("response_format", "json", {"type": "object"} if named is None else named["schema"]))
    for kind in get_args(FormKind):
        if (said := getattr(given, f"guided_{kind}")) is not None:
            found.append((f"guided_{kind}", kind, said))
    return found


def one_form(found: Sequence[Form]) -> Form | None:
    """The only form that an answer is given, or None where there is none.

    Raises:
        ValidationError: there are several.
    """
    if len(found) > 1:
        (one, first, _), (other, second, _) = found[:2]
        either = f"its {first} or its {second}" if one == other else f"{one} or {other}"
        raise ValidationError(f"An answer has one form: give {either}.", details={"param": other})
    return found[0] if found else None


def check_ends(form: str, given: object) -> None:
    """Refuses what holds off an end where a form says when the answer ends.

    Args:
        form: the argument that gives the form.
        given: has ``ignore_eos`` and ``min_tokens``.
    """
    for other in ("ignore_eos", "min_tokens"):
        if getattr(given, other, None):
            raise ValidationError(
                f"{other} holds off the end that {form} asks for: leave one of them out.",
                details={"param": other},
            )


def _wrong(name: str, should: str, got: object) -> ValidationError:
    return ValidationError(f"{name} {should}; got {got!r:.200}.", details={"param": name})


def _number(value: object) -> float | None:
    """A finite number of any kind, without torch, which remote clients do without."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _token_ids(given: Any) -> tuple[int, ...] | None:
    if given is None:
        return None
    several = isinstance(given, Iterable) and not isinstance(given, (str, bytes, Mapping))
    ids = tuple(as_whole(one) for one in given) if several else (None,)
    whole = tuple(one for one in ids if one is not None and one >= 0)
    if len(whole) < len(ids) or len(ids) > MOST_STOP_IDS:
        raise _wrong(
            "stop_token_ids", f"is a list of token ids, each 0 or more, at most {MOST_STOP_IDS}", given
        )
    return whole


def _biases(given: Any) -> dict[int, float] | None:
    if given is None:
        return None
    if not isinstance(given, Mapping) or len(given) > MOST_BIASES:
        raise _wrong("logit_bias", f"is {{token id: bias}} of at most {MOST_BIASES} tokens", given)
    found: dict[int, float] = {}
    for key, value in given.items():
        token = _token(key)
        bias = _number(value)
        if token is None or token < 0:
            raise _wrong("logit_bias", "has token ids as its keys", key)
        if bias is None or abs(bias) > MOST_BIAS:
            raise _wrong("logit_bias", f"has biases from {-MOST_BIAS:g} to {MOST_BIAS:g}", value)
        found[token] = bias
    return found


def _as_format(given: Any) -> dict[str, Any] | None:
    if given is None:
        return None
    kind = given.get("type") if isinstance(given, Mapping) else None
    if kind not in _FORMATS:
        raise _wrong("response_format", f"has a type, one of {', '.join(map(repr, _FORMATS))}", given)
    named = given.get("json_schema")
    schema = named.get("schema") if isinstance(named, Mapping) else None
    if (kind == "json_schema") != isinstance(schema, Mapping) or (
        kind != "json_schema" and named is not None
    ):
        raise _wrong(
            "response_format",
            "of the type 'json_schema' has {'json_schema': {'schema': …}}, no other has",
            given,
        )
    return dict(given)


def _choice(given: Any) -> tuple[str, ...] | None:
    if given is None:
        return None
    several = isinstance(given, Iterable) and not isinstance(given, (str, bytes, Mapping))
    texts = tuple(given) if several else ()
    if not texts or not all(isinstance(one, str) and one for one in texts):
        raise _wrong("guided_choice", "is a list of texts, none of them empty", given)
    return texts


def _token(key: object) -> int | None:
    """A token id, or the text that JSON has for it: one for each, so that no two keys are the same token."""
    if isinstance(key, str):
        number = int(key) if key.isascii() and key.isdigit() and len(key) < 19 else -1
        return number if str(number) == key else None
    return as_whole(key)
