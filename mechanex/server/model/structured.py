"""The fields of a body that give an answer its form: JSON by a schema, a regular expression, a choice, a grammar."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from anyio.to_thread import run_sync
from pydantic import Field, model_validator

from ...engine.answering import Form, FormKind, check_ends, forms, one_form
from ...engine.decode.grammar import Grammar
from ...errors import ValidationError
from ..http.body import Body, Items, Part, refused
from ..http.errors import invalid

if TYPE_CHECKING:
    from .engine import ServingEngine

__all__ = ["FormFields", "form_of"]

Schema = dict[str, Any]
_Texts = Annotated[
    Items[Annotated[str, Field(min_length=1, max_length=10_000)]], Field(min_length=1, max_length=1024)
]


class _Named(Part):
    name: str | None = None
    description: str | None = None
    schema_: Schema = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Part):
    """OpenAI's ``response_format``."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: _Named | None = None

    @model_validator(mode="after")
    def _with_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise refused("json_schema", "json_schema goes with type 'json_schema', and that with it")
        return self


class _Outputs(Part):
    """vLLM's newer way to say the same as ``guided_…``."""

    json_: Schema | None = Field(default=None, alias="json")
    json_object: bool | None = None
    regex: str | None = Field(default=None, min_length=1)
    choice: _Texts | None = None
    grammar: str | None = Field(default=None, min_length=1)

    @model_validator(mode="after")
    def _says_something(self) -> _Outputs:
        if not self.forms:
            raise refused(
                "structured_outputs", "give json, json_object, regex, choice or grammar; one of them"
            )
        return self

    @property
    def forms(self) -> list[tuple[FormKind, Any]]:
        """What kinds they are, and what they say."""
        said: dict[FormKind, Any] = {
            "json": self.json_,
            "regex": self.regex,
            "choice": self.choice,
            "grammar": self.grammar,
        }
        found = [(kind, given) for kind, given in said.items() if given is not None]
        return [*found, ("json", {"type": "object"})] if self.json_object else found


class FormFields(Body):
    """What form an answer has; one of them."""

    response_format: ResponseFormat | None = None
    guided_json: Schema | None = Field(default=None, description="A JSON schema.")
    guided_regex: str | None = Field(default=None, min_length=1, description="The whole answer matches it.")
    guided_choice: _Texts | None = Field(default=None, description="The answer is one of these texts.")
    guided_grammar: str | None = Field(
        default=None, min_length=1, description="A grammar, in Lark's form or as GBNF."
    )

    structured_outputs: _Outputs | None = Field(
        default=None, description="json, json_object, regex, choice or grammar: one of them."
    )

    @property
    def form(self) -> Form | None:
        """The name of the field that gives the form, what kind it is, and what it says."""
        wanted = self.response_format
        found = forms(self, None if wanted is None else wanted.model_dump(by_alias=True))
        if self.structured_outputs is not None:
            found += [("structured_outputs", *one) for one in self.structured_outputs.forms]
        return one_form(found)


async def form_of(engine: ServingEngine, body: FormFields) -> Grammar | None:
    """The grammar that answers follow, if any.

    Raises:
        ValidationError: a form that can't be followed, with the field as ``param``.
    """
    form = body.form
    if form is None:
        return None
    check_ends(form[0], body)
    try:
        grammars = await run_sync(engine.grammars)
    except ValidationError as error:
        raise invalid(error.message, form[0]) from error
    return await run_sync(grammars.of_form, form)
