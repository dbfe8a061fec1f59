"""Cases of the official SDKs of OpenAI and Anthropic: responses, messages, embeddings."""

from __future__ import annotations

import anthropic
import openai
import pytest
from calling import MODEL, Api, case

QUESTION = "Where is Anna?"
TURNS = [
    {"role": "user", "content": QUESTION},
    {"role": "assistant", "content": "In Rome."},
    {"role": "user", "content": "What does she eat?"},
]
GREEDY = {"temperature": 0}
STEERED = {"steering_vector": "calm_angry", "steering_strength": 4.0}


def _openai(api: Api) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{api.url}/v1", api_key="any", max_retries=0)


def _anthropic(api: Api) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=api.url, api_key="any", max_retries=0)


@case("OpenAI SDK", "responses.create answers as a chat does, from a text or from messages with instructions")
def _(api: Api) -> None:
    client = _openai(api)
    one = client.responses.create(model=MODEL, input=QUESTION, max_output_tokens=12, temperature=0)
    assert one.output_text == api.chat()["message"]["content"]
    assert one.usage is not None and one.usage.output_tokens > 1 and one.object == "response"
    told = client.responses.create(
        model=MODEL, instructions="Be kind.", input=TURNS, max_output_tokens=12, temperature=0
    )
    messages = [{"role": "system", "content": "Be kind."}, *TURNS]
    same = api.post("/v1/chat/completions", messages=messages, max_tokens=12, temperature=0)
    assert told.output_text == same["choices"][0]["message"]["content"]
    # An answer's own items are sent back as they came.
    again = [*TURNS[:1], *(item.model_dump() for item in one.output), *TURNS[2:]]
    assert client.responses.create(model=MODEL, input=again, max_output_tokens=4, temperature=0).output_text


@case("OpenAI SDK", "responses.create tells max_output_tokens as incomplete")
def _(api: Api) -> None:
    one = _openai(api).responses.create(model=MODEL, input=QUESTION, max_output_tokens=2, temperature=0)
    assert one.status == "incomplete" and one.incomplete_details is not None
    assert one.incomplete_details.reason == "max_output_tokens"


@case("OpenAI SDK", "responses.stream gives the same text in pieces, steered as asked")
def _(api: Api) -> None:
    with _openai(api).responses.stream(
        model=MODEL, input=QUESTION, max_output_tokens=12, temperature=0, extra_body=STEERED
    ) as stream:
        events = list(stream)
    final = events[-1].response  # type: ignore[union-attr]
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == final.output_text == api.chat(**STEERED)["message"]["content"]
    numbers = [event.sequence_number for event in events]
    assert numbers == sorted(numbers)
    assert events[0].type == "response.created"


@case("OpenAI SDK", "responses that would need kept state, tools or the background are refused")
def _(api: Api) -> None:
    for fields in (
        {"previous_response_id": "resp_1"},
        {"background": True},
        {"tools": [{"type": "web_search"}]},
        {"conversation": "conv_1"},
    ):
        with pytest.raises(openai.BadRequestError, match=next(iter(fields)).split("_")[0]):
            _openai(api).responses.create(model=MODEL, input="a", **fields)  # type: ignore[call-overload]


@case("Anthropic SDK", "messages.create answers as a chat does, with system, stop_sequences and usage")
def _(api: Api) -> None:
    client = _anthropic(api)
    one = client.messages.create(
        model=MODEL, max_tokens=12, messages=[{"role": "user", "content": QUESTION}], extra_body=GREEDY
    )
    plain = api.chat()
    assert one.content[0].text == plain["message"]["content"] and one.role == "assistant"  # type: ignore[union-attr]
    assert one.stop_reason == {"length": "max_tokens", "stop": "end_turn"}[plain["finish_reason"]]
    assert one.usage.output_tokens > 1
    told = client.messages.create(
        model=MODEL, system="Be kind.", max_tokens=12, messages=TURNS, extra_body=STEERED | GREEDY
    )
    messages = [{"role": "system", "content": "Be kind."}, *TURNS]
    same = api.post("/v1/chat/completions", messages=messages, max_tokens=12, temperature=0, **STEERED)
    assert told.content[0].text == same["choices"][0]["message"]["content"]  # type: ignore[union-attr]
    stop = plain["message"]["content"][3:6]
    ended = client.messages.create(
        model=MODEL, max_tokens=12, stop_sequences=[stop], messages=TURNS[:1], extra_body=GREEDY
    )
    assert (ended.stop_reason, ended.stop_sequence) == ("stop_sequence", stop)
    empty = api.call("POST", "/v1/messages", {"messages": TURNS[:1], "max_tokens": 1, "stop_sequences": [""]})
    assert empty.status == 400 and "'stop_sequences'" in empty.body["error"]["message"]


@case("Anthropic SDK", "messages.stream gives the same text in pieces")
def _(api: Api) -> None:
    with _anthropic(api).messages.stream(
        model=MODEL, max_tokens=12, messages=TURNS[:1], extra_body=GREEDY
    ) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == api.chat()["message"]["content"] == final.content[0].text  # type: ignore[union-attr]
    assert final.usage.output_tokens > 1 and final.stop_reason


@case("Anthropic SDK", "a last message of the assistant is gone on with")
def _(api: Api) -> None:
    begun = [*TURNS[:1], {"role": "assistant", "content": "She is in"}]
    one = _anthropic(api).messages.create(model=MODEL, max_tokens=8, messages=begun, extra_body=GREEDY)
    same = api.post(
        "/v1/chat/completions", messages=begun, max_tokens=8, temperature=0, continue_final_message=True
    )
    assert one.content[0].text == same["choices"][0]["message"]["content"]  # type: ignore[union-attr]


@case("Anthropic SDK", "messages.count_tokens counts what a chat is read as")
def _(api: Api) -> None:
    n = _anthropic(api).messages.count_tokens(model=MODEL, messages=TURNS[:1]).input_tokens
    assert n == len(api.chat(return_token_ids=True)["prompt_token_ids"])


@case("Anthropic SDK", "errors are Anthropic's own exceptions, with what was wrong")
def _(api: Api) -> None:
    client = _anthropic(api)
    with pytest.raises(anthropic.NotFoundError, match="other"):
        client.messages.create(model="other", max_tokens=1, messages=TURNS[:1])
    with pytest.raises(anthropic.BadRequestError, match="maximum context length"):
        client.messages.create(model=MODEL, max_tokens=5_000, messages=TURNS[:1])
    error = api.call("POST", "/v1/messages", {"messages": TURNS})
    assert error.status == 400 and error.body["type"] == "error"
    assert error.body["error"]["type"] == "invalid_request_error"


@case("OpenAI SDK", "embeddings.create gives floats")
def _(api: Api) -> None:
    found = _openai(api).embeddings.create(model=MODEL, input=["a market", "a river"])
    assert len(found.data) == 2 and len(found.data[0].embedding) == 128


@case("OpenAI", "errors name the field that was sent, whichever API it came by")
def _(api: Api) -> None:
    long, unknown = "word " * 600, [999_999]
    chat = [{"role": "user", "content": long}]
    for path, body, param in (
        ("/v1/responses", {"input": long}, "input"),
        ("/v1/responses", {"input": "a", "max_output_tokens": 600}, "max_output_tokens"),
        (
            "/v1/responses",
            {"input": "a", "text": {"format": {"type": "json_schema", "name": "a", "schema": {"type": "?"}}}},
            "text",
        ),
        ("/v1/chat/completions", {"messages": chat}, "messages"),
        ("/v1/chat/completions", {"messages": chat, "max_tokens": 5}, "messages"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "a"}], "max_completion_tokens": 600},
            "max_completion_tokens",
        ),
        ("/v1/completions", {"prompt": long}, "prompt"),
        ("/v1/completions", {"prompt": unknown}, "prompt"),
        ("/v1/completions", {"prompt": "a", "max_tokens": 600}, "max_tokens"),
        ("/v1/completions", {"prompt": ["a"] * 129}, "prompt"),
        ("/v1/completions", {"prompt": ["a"] * 2, "n": 128}, "n"),
        ("/v1/completions", {"prompt": ["a"] * 2, "best_of": 128}, "best_of"),
        ("/v1/embeddings", {"input": [unknown]}, "input"),
        ("/v1/embeddings", {"input": long}, "input"),
        ("/tokenize", {"prompt": "word " * 20_000}, "prompt"),
        ("/detokenize", {"tokens": unknown}, "tokens"),
    ):
        error = api.refused(path, **body)
        assert error["param"] == param, (path, list(body), error)
        for other in {"messages", "response_format", "max_completion_tokens"} - {param}:
            assert other not in error["message"], error


@case("OpenAI", "a prompt that fills the context has no room for an answer")
def _(api: Api) -> None:
    full = [5] * 512
    error = api.refused("/v1/completions", prompt=full)
    assert (
        error["code"] == "context_length_exceeded" and "513 tokens (512 in the prompt, 1" in error["message"]
    )
