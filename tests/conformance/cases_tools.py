"""Cases of tools: offered, called, answered."""

from __future__ import annotations

import json
from typing import Any

from calling import MODEL, Api, case
from openai import OpenAI

QUESTION = [{"role": "user", "content": "What is the weather in Rome?"}]
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Rome", "Paris"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
CLOCK: dict[str, Any] = {"type": "function", "function": {"name": "clock"}}
CALLED = r'<tool_call>\n\{"name": "weather", "arguments": \{"city": "(Rome|Paris)"\}\}\n</tool_call>'
FIELDS = {
    "model": MODEL,
    "messages": QUESTION,
    "tools": [WEATHER, CLOCK],
    "temperature": 0,
    "max_tokens": 100,
}


def _client(api: Api) -> Any:
    return OpenAI(base_url=f"{api.url}/v1", api_key="any", max_retries=0)


@case("OpenAI SDK", "a call that the model writes comes as tool_calls, in streams too")
def _(api: Api) -> None:
    body = {"guided_regex": CALLED}
    one = _client(api).chat.completions.create(**FIELDS, extra_body=body).choices[0]
    assert one.finish_reason == "tool_calls" and one.message.content is None
    (call,) = one.message.tool_calls
    assert call.function.name == "weather" and json.loads(call.function.arguments)["city"] in (
        "Rome",
        "Paris",
    )
    with _client(api).chat.completions.stream(**FIELDS, extra_body=body) as stream:
        last = stream.get_final_completion().choices[0]
    assert last.finish_reason == "tool_calls"
    assert last.message.tool_calls[0].function.arguments == call.function.arguments


@case("OpenAI SDK", "an answer without a call is text, and the model is told of the tools")
def _(api: Api) -> None:
    whole = _client(api).chat.completions.create(**FIELDS | {"max_tokens": 8})
    assert whole.choices[0].message.content and not whole.choices[0].message.tool_calls
    told = api.post("/tokenize", messages=QUESTION, tools=FIELDS["tools"])["tokens"]
    assert whole.usage.prompt_tokens == len(told) > len(api.post("/tokenize", messages=QUESTION)["tokens"])
    none = _client(api).chat.completions.create(**FIELDS | {"max_tokens": 8}, tool_choice="none")
    assert none.usage.prompt_tokens == len(api.post("/tokenize", messages=QUESTION)["tokens"])
    events = api.stream("/v1/chat/completions", **FIELDS | {"max_tokens": 8})
    text = "".join(event["choices"][0]["delta"].get("content") or "" for event in events)
    assert text == whole.choices[0].message.content


@case("OpenAI SDK", "tool_choice required, and a function by name, always give a call that fits")
def _(api: Api) -> None:
    named = {"type": "function", "function": {"name": "weather"}}
    fields = FIELDS | {"tools": [WEATHER]}
    for choice in ("required", named):
        for more in ({}, {"temperature": 1.2, "seed": 1}):
            one = _client(api).chat.completions.create(**fields | more, tool_choice=choice).choices[0]
            (call,) = one.message.tool_calls
            assert one.finish_reason == "tool_calls" and call.function.name == "weather"
            assert json.loads(call.function.arguments) in ({"city": "Rome"}, {"city": "Paris"})


@case("OpenAI SDK", "calls and what they gave are sent back")
def _(api: Api) -> None:
    one = (
        _client(api)
        .chat.completions.create(**FIELDS | {"tools": [WEATHER]}, tool_choice="required")
        .choices[0]
    )
    given = {"role": "tool", "tool_call_id": one.message.tool_calls[0].id, "content": "It rains."}
    messages = [*QUESTION, one.message.model_dump(exclude_none=True), given]
    again = _client(api).chat.completions.create(**FIELDS | {"messages": messages, "max_tokens": 8})
    assert again.choices[0].message.content is not None
    written = api.post("/detokenize", tokens=api.post("/tokenize", messages=messages)["tokens"])["prompt"]
    assert "It rains." in written and '"arguments": {"city"' in written


@case("mechanex", "control tokens that tools and calls spell, in names of arguments too, are text")
def _(api: Api) -> None:
    (end,) = api.post("/tokenize", prompt="<|end|>", add_special_tokens=False)["tokens"]

    def asked(text: str) -> tuple[int, int]:
        """How many control tokens a chat has that says this text in all places, and how often it reads so."""
        parameters = {"type": "object", "properties": {text: {"type": "string", "description": text}}}
        tool = {"type": "function", "function": {"name": "f", "description": text, "parameters": parameters}}
        written = json.dumps({text: text, "role": text})
        call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": written}}
        said = [{"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": text}]
        tokens = api.post("/tokenize", messages=[*QUESTION, *said], tools=[tool])["tokens"]
        return tokens.count(end), api.post("/detokenize", tokens=tokens)["prompt"].count("<|end|>")

    plain, spelled = asked("x"), asked("<|end|>")
    assert spelled[0] == plain[0] == plain[1] and spelled[1] == plain[1] + 7


@case("OpenAI", "tools that can't be honoured are a 400 that says why")
def _(api: Api) -> None:
    path = "/v1/chat/completions"
    error = api.refused(path, messages=QUESTION, tools=[{"type": "web_search"}])
    assert error["param"] == "tools"
    assert api.refused(path, messages=QUESTION, tools=[CLOCK, CLOCK])["param"] == "tools"
    missing = {"type": "function", "function": {"name": "nope"}}
    assert "nope" in api.refused(path, messages=QUESTION, tools=[CLOCK], tool_choice=missing)["message"]
    api.refused(path, messages=QUESTION, tool_choice="required")
    bad = {"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "clock", "arguments": "no"}}]}
    assert "JSON" in api.refused(path, messages=[*QUESTION, bad])["message"]
