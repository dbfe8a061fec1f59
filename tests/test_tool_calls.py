"""Calls in answers, as the templates of Hermes and Qwen, Mistral and Llama teach models to write them."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from mechanex.engine.tool_calls import CallFormat, ToolCall, call_format, calls_in, knows_tools, schema_of

CALL = {"name": "weather", "arguments": {"city": "Zürich"}}
ARGUMENTS = json.dumps(CALL["arguments"], ensure_ascii=False)
OTHER = {"name": "clock", "arguments": {}}


@pytest.mark.parametrize(
    ("form", "text", "content", "n"),
    [
        ("hermes", f"<tool_call>\n{json.dumps(CALL)}\n</tool_call>", "", 1),
        (
            "hermes",
            f"I look.\n<tool_call>{json.dumps(CALL)}</tool_call>\n<tool_call>{json.dumps(OTHER)}",
            "I look.",
            2,
        ),
        ("mistral", f"[TOOL_CALLS] {json.dumps([CALL, OTHER])}", "", 2),
        (
            "mistral",
            f"[TOOL_CALLS]weather[ARGS]{ARGUMENTS}[TOOL_CALLS]clock[CALL_ID]abc123def[ARGS]{{}}",
            "",
            2,
        ),
        ("llama", json.dumps({"name": "weather", "parameters": CALL["arguments"]}), "", 1),
        ("llama", f"<|python_tag|>{json.dumps(CALL)}; {json.dumps(OTHER)}", "", 2),
    ],
)
def test_calls_are_found(form: CallFormat, text: str, content: str, n: int) -> None:
    expected = [ToolCall("weather", ARGUMENTS), ToolCall("clock", "{}")][:n]
    assert calls_in(text, form, ["weather", "clock"]) == (content, expected)


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ("hermes", "It rains."),
        ("hermes", '<tool_call>{"name": "weather", "argum'),
        ("hermes", '<tool_call>{"name": "nobody", "arguments": {}}</tool_call>'),
        ("mistral", "[TOOL_CALLS] no list"),
        ("mistral", "[TOOL_CALLS]weather[ARGS]{no"),
        ("llama", '{"city": "Rome"}'),
        ("llama", "{half"),
    ],
)
def test_what_is_no_whole_call_of_an_offered_function_is_text(form: CallFormat, text: str) -> None:
    found = calls_in(text, form, ["weather"])
    assert found[0] == text and found[1] == []


@pytest.mark.parametrize(
    ("template", "form"),
    [
        ("{% if tools %}<tool_call>{% endif %}", "hermes"),
        ("{% if tools %}[AVAILABLE_TOOLS]{% endif %}[TOOL_CALLS]", "mistral"),
        ("{% if tools %}{% endif %}<|python_tag|>", "llama"),
        ({"default": "plain", "tool_use": "{% if tools %}<tool_call>{% endif %}"}, "hermes"),
        ("{% if tools %}{% endif %}", None),
    ],
)
def test_the_form_is_that_of_the_template(template: Any, form: CallFormat | None) -> None:
    tokenizer = SimpleNamespace(chat_template=template)
    assert knows_tools(tokenizer) and call_format(tokenizer) == form
    assert not knows_tools(SimpleNamespace(chat_template="{{ messages }}"))


@pytest.mark.parametrize("others", [[], [{"name": "clock"}]])
def test_references_inside_parameters_hold_in_the_schema_of_a_call(others: list[dict[str, Any]]) -> None:
    parameters = {
        "type": "object",
        "properties": {"place": {"$ref": "#/$defs/Place"}},
        "$defs": {"Place": {"type": "object", "properties": {"city": {"type": "string"}}}},
    }
    schema = schema_of([*others, {"name": "weather", "parameters": parameters}])
    call = schema["anyOf"][-1] if others else schema
    found: Any = schema
    for step in call["properties"]["arguments"]["properties"]["place"]["$ref"].split("/")[1:]:
        found = found[int(step) if isinstance(found, list) else step]
    assert found == parameters["$defs"]["Place"]
