"""Cases of answers in a given form."""

from __future__ import annotations

import json
import re

from calling import MODEL, PROMPT, Api, case
from openai import OpenAI
from pydantic import BaseModel

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Rome", "Paris"]},
        "people": {"type": "array", "items": {"enum": ["Anna", "Ben"]}, "maxItems": 2},
        "open": {"type": "boolean"},
    },
    "required": ["city", "people", "open"],
    "additionalProperties": False,
}
STEERED = {"steering_vector": "calm_angry", "steering_strength": 3.0}
FORM = {"type": "json_schema", "json_schema": {"name": "place", "schema": SCHEMA, "strict": True}}


def _fits(text: str) -> None:
    found = json.loads(text)
    assert set(found) == {"city", "people", "open"} and found["city"] in ("Rome", "Paris")
    assert isinstance(found["open"], bool) and set(found["people"]) <= {"Anna", "Ben"}


@case("OpenAI", "response_format json_schema gives JSON by the schema, drawn or greedy, steered or not")
def _(api: Api) -> None:
    for fields in ({}, {"temperature": 1.5, "seed": 3}, STEERED):
        one = api.chat(response_format=FORM, max_tokens=80, **fields)
        assert one["finish_reason"] == "stop"
        _fits(one["message"]["content"])


@case("OpenAI", "response_format json_object gives the begin of an object")
def _(api: Api) -> None:
    assert api.chat(response_format={"type": "json_object"}, max_tokens=5)["message"]["content"].startswith(
        "{"
    )
    assert api.chat(response_format={"type": "text"})["message"] == api.chat()["message"]


@case("OpenAI", "a stream in a form is the same text")
def _(api: Api) -> None:
    messages = [{"role": "user", "content": "Where is Anna?"}]
    fields = {"messages": messages, "response_format": FORM, "max_tokens": 80, "temperature": 0}
    events = api.stream("/v1/chat/completions", **fields)
    text = "".join(event["choices"][0]["delta"].get("content", "") for event in events)
    assert text == api.post("/v1/chat/completions", **fields)["choices"][0]["message"]["content"]


@case("OpenAI SDK", "chat.completions.parse gives the object of a pydantic class")
def _(api: Api) -> None:
    class Place(BaseModel):
        open: bool
        far: bool

    client = OpenAI(base_url=f"{api.url}/v1", api_key="any", max_retries=0)
    one = client.chat.completions.parse(
        model=MODEL,
        messages=[{"role": "user", "content": "Is it open?"}],
        response_format=Place,
        max_tokens=60,
        temperature=0,
    )
    assert isinstance(one.choices[0].message.parsed, Place)


@case("OpenAI SDK", "responses.parse gives the object of a pydantic class")
def _(api: Api) -> None:
    class Day(BaseModel):
        sunny: bool

    client = OpenAI(base_url=f"{api.url}/v1", api_key="any", max_retries=0)
    one = client.responses.parse(
        model=MODEL, input="Is it sunny?", text_format=Day, max_output_tokens=60, temperature=0
    )
    assert isinstance(one.output_parsed, Day)


@case("vLLM", "guided_choice, guided_regex, guided_json and guided_grammar")
def _(api: Api) -> None:
    assert api.complete(guided_choice=["Rome", "Paris"])["text"] in ("Rome", "Paris")
    one = api.complete(guided_regex="[0-9]{3}-[a-c]{2}", max_tokens=30)
    assert re.fullmatch("[0-9]{3}-[a-c]{2}", one["text"]) and one["finish_reason"] == "stop"
    assert api.complete(structured_outputs={"choice": ["Rome", "Paris"]})["text"] in ("Rome", "Paris")
    _fits(api.complete(structured_outputs={"json": SCHEMA}, max_tokens=80)["text"])
    _fits(api.complete(guided_json=SCHEMA, max_tokens=80)["text"])
    assert re.fullmatch("(ab)+c", api.complete(guided_grammar='start: ("a" "b")~1..3 "c"')["text"])
    assert re.fullmatch("ab?", api.complete(guided_grammar='root ::= "a" "b"?')["text"])


@case("vLLM", "rows in a form and rows without are what they are alone, in one batch")
def _(api: Api) -> None:
    both = api.post(
        "/v1/completions",
        prompt=[PROMPT, "The food in Rome"],
        guided_regex="[a-z]{9}",
        temperature=0,
        max_tokens=20,
    )["choices"]
    assert [one["text"] for one in both] == [
        api.complete(prompt, guided_regex="[a-z]{9}", max_tokens=20)["text"]
        for prompt in (PROMPT, "The food in Rome")
    ]


@case("vLLM", "a form that is none, or two of them, is a 400 that names the field")
def _(api: Api) -> None:
    for fields, param in (
        ({"guided_regex": "("}, "guided_regex"),
        ({"guided_json": {"type": "nope"}}, "guided_json"),
        ({"guided_grammar": "no grammar"}, "guided_grammar"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": ["a"], "guided_regex": "a"}, "guided_choice"),
        ({"structured_outputs": {"choice": ["a"], "regex": "a"}}, "structured_outputs"),
        ({"guided_json": {"$ref": "#"}}, "guided_json"),
        ({"guided_choice": ["a"], "ignore_eos": True}, "ignore_eos"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}}, "response_format"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"json_object": False}}, "structured_outputs"),
        ({"response_format": {"type": "xml"}}, "response_format"),
    ):
        assert api.refused("/v1/completions", prompt="a", **fields)["param"] == param, fields
