"""Tools of chats: what a body offers, how the model is told, and its calls in the reply."""

from __future__ import annotations

import json
import random
import string
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator

from ...engine.tool_calls import CallFormat, ToolCall, call_format, calls_in, knows_tools
from ..http.body import Part
from ..http.errors import invalid
from ..model.requests import Result

if TYPE_CHECKING:
    from ..model.engine import ServingEngine

__all__ = ["AssistantCall", "CallReader", "Tool", "ToolChoice", "check_tools", "reader_of"]

_Function = Annotated[str, Field(min_length=1, max_length=128)]


class _FunctionOffer(Part):
    name: _Function
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Part):
    """A function that the model may call."""

    type: Literal["function"]
    function: _FunctionOffer

    @property
    def rendered(self) -> dict[str, Any]:
        """As chat templates take it."""
        one = self.function
        function = {
            "name": one.name,
            "description": one.description or "",
            "parameters": one.parameters or {},
        }
        return {"type": "function", "function": function}


class _FunctionName(Part):
    name: _Function


class ToolChoice(Part):
    """The function that has to be called."""

    type: Literal["function"]
    function: _FunctionName


class _WrittenFunction(Part):
    name: _Function
    arguments: str

    @field_validator("arguments")
    @classmethod
    def _object(cls, arguments: str) -> str:
        try:
            found = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise ValueError("a call's arguments are a JSON object, written as text")
        return arguments or "{}"


class AssistantCall(Part):
    """A call in a message of the assistant that is sent back."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: _WrittenFunction
    index: int | None = None

    @property
    def rendered(self) -> dict[str, Any]:
        """As chat templates take it: the arguments as an object."""
        function = {"name": self.function.name, "arguments": json.loads(self.function.arguments)}
        return {"type": "function", "function": function} | ({"id": self.id} if self.id else {})


class CallReader:
    """Finds the calls in answers.

    Args:
        engine: decodes tokens.
        names: of the functions that were offered.
        form: how the model writes calls; None where answers are held to be one call as JSON.
        ends: tokens that end answers.
    """

    def __init__(
        self, engine: ServingEngine, names: Sequence[str], form: CallFormat | None, ends: Sequence[int]
    ) -> None:
        self._engine, self._names, self._form, self._ends = engine, names, form, frozenset(ends)

    def message(self, result: Result) -> dict[str, Any]:
        """The fields ``content`` and ``tool_calls`` of a finished answer."""
        content, calls = self._found(result)
        if not calls:
            return {"content": result.text}
        return {"content": content or None, "tool_calls": [self._told(one) for one in calls]}

    def _found(self, result: Result) -> tuple[str, list[ToolCall]]:
        if self._form is None:
            try:
                one = json.loads(result.text)
            except ValueError:  # max_tokens ended it
                return result.text, []
            return "", [ToolCall(one["name"], json.dumps(one["arguments"], ensure_ascii=False))]
        tokens = [token for token in result.tokens if token not in self._ends]
        return calls_in(self._engine.encoder.decode_whole(tokens), self._form, self._names)

    def _told(self, call: ToolCall) -> dict[str, Any]:
        # Templates of Mistral's take ids of nine letters and digits, others any.
        letters = random.choices(string.ascii_letters + string.digits, k=9)
        return {
            "id": "".join(letters),
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }


def check_tools(engine: ServingEngine) -> None:
    """Raises a ValidationError where the model's template doesn't know tools."""
    if not knows_tools(engine.tokenizer):
        raise invalid(
            f"{engine.model_name} can't be told of tools: its chat template has no place for them. Use a model whose "
            "template has one, or describe them in a message and ask for JSON by response_format.",
            "tools",
        )


def reader_of(engine: ServingEngine, tools: Sequence[Tool], choice: str | ToolChoice | None) -> CallReader:
    """What finds the calls of these tools.

    Raises:
        ValidationError: the model's template doesn't know tools, or how it writes calls isn't known.
    """
    check_tools(engine)
    names = [one.function.name for one in tools]
    if len(set(names)) < len(names):
        raise invalid("Two tools have the same name.", "tools")
    if choice == "required" or isinstance(choice, ToolChoice):
        if isinstance(choice, ToolChoice) and choice.function.name not in names:
            raise invalid(
                f"tool_choice names {choice.function.name!r}, which is not among the tools.", "tool_choice"
            )
        return CallReader(engine, names, None, ())
    form = call_format(engine.tokenizer)
    if form is None:
        raise invalid(
            f"How {engine.model_name} writes calls isn't known here (known are Hermes' and Qwen's, Llama's, and "
            "Mistral's): ask for tool_choice 'required', whose form is given.",
            "tool_choice",
        )
    return CallReader(engine, names, form, engine.ends)
