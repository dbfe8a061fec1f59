"""OpenAI's own Python client against a real server process."""

from __future__ import annotations

import asyncio
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import torch
from openai import OpenAI
from server_process import ServerProcess, serving
from serving_data import tone_vectors

from mechanex.engine.chat import Chat
from mechanex.engine.conditions.fitting import prompt_means
from mechanex.engine.generate import generate
from mechanex.engine.models import adapter_for
from mechanex.engine.models.resolve import load
from mechanex.engine.prompt_conditions import PromptCondition
from mechanex.engine.text import encode_prompt
from mechanex.engine.vectors import SteeringVector

PROMPT = "Anna went to the market on Friday."
OTHER = "The food in Rome"
THRESHOLD = 0.0
CHAT: list[Any] = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "What is the capital of France?"},
]


@pytest.fixture(scope="module")
def local() -> Any:
    return load("mx-tiny", backend="transformers")


@pytest.fixture(scope="module")
def vectors(local: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("vectors")
    SteeringVector({4: torch.full((128,), 1e38)}).save(folder / "huge.safetensors")
    found = tone_vectors(local.model, local.tokenizer, folder)
    ids = [encode_prompt(local.tokenizer, prompt) for prompt in (PROMPT, OTHER)]
    means = prompt_means(adapter_for(local.model), ids, [2])[2]
    market = SteeringVector({2: means[0] - means[1]})
    market.save(folder / "market.safetensors")
    condition = PromptCondition(2, market[2], THRESHOLD)
    found["calm_angry"].when(condition).save(folder / "calm_at_the_market.safetensors")
    return folder, found


@pytest.fixture(scope="module")
def server(vectors: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with serving(
        "--vectors", str(vectors[0]), "--behaviors", "calm_angry", home=tmp_path_factory.mktemp("home")
    ) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="any key does here", max_retries=0)


def expected(local: Any, prompt: Any, n: int, vector: Any = None, strength: float = 1.0) -> str:
    steered = {} if vector is None else {"vector": vector, "strength": strength}
    ids = encode_prompt(local.tokenizer, prompt)
    text = local.tokenizer.decode(ids)
    whole = generate(local.model, local.tokenizer, ids, max_tokens=n, sampling_method="greedy", **steered)
    return whole[len(text) :]


@pytest.mark.parametrize(
    "body",
    [
        {
            "steering_vector": "calm_angry",
            "steering_strength": -2,
            "steering_condition": {"vector": "market", "threshold": THRESHOLD},
        },
        {"steering_vector": "calm_at_the_market", "steering_strength": -2},
        {
            "steering": [
                {
                    "vector": "calm_angry",
                    "strength": -2,
                    "condition": {"vector": "market", "threshold": THRESHOLD, "layer": 2},
                }
            ]
        },
    ],
)
def test_prompts_that_meet_a_condition_are_steered(
    client: OpenAI, local: Any, vectors: Any, body: dict[str, Any]
) -> None:
    steered = [expected(local, PROMPT, 20, vectors[1]["calm_angry"], -2.0), expected(local, OTHER, 20)]
    assert steered[0] != expected(local, PROMPT, 20)
    options: dict[str, Any] = {
        "model": "mx-tiny",
        "max_tokens": 20,
        "temperature": 0,
        "extra_body": body,
    }
    together = client.completions.create(prompt=[PROMPT, OTHER], **options)
    assert [choice.text for choice in together.choices] == steered
    for prompt, text in zip((PROMPT, OTHER), steered, strict=True):
        pieces = client.completions.create(prompt=prompt, stream=True, **options)
        assert "".join(piece.choices[0].text for piece in pieces) == text


def test_models(client: OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == "mx-tiny"
    assert client.models.retrieve("mx-tiny").owned_by == "mechanex"
    with pytest.raises(openai.NotFoundError, match="gpt-4"):
        client.models.retrieve("gpt-4")


def test_completion(client: OpenAI, local: Any) -> None:
    answer = client.completions.create(model="mx-tiny", prompt=PROMPT, max_tokens=20, temperature=0)
    assert answer.object == "text_completion"
    assert answer.choices[0].text == expected(local, PROMPT, 20)
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].logprobs is None
    n_ids = len(encode_prompt(local.tokenizer, PROMPT))
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (n_ids, 20)
    assert answer.usage.total_tokens == n_ids + 20
    assert answer._request_id


def test_prompts_of_every_kind(client: OpenAI, local: Any) -> None:
    ids = encode_prompt(local.tokenizer, PROMPT), encode_prompt(local.tokenizer, OTHER)
    truth = expected(local, PROMPT, 8), expected(local, OTHER, 8)
    prompts: list[Any] = [[PROMPT, OTHER], ids[0], [ids[0], ids[1]]]
    for prompt, texts in zip(prompts, (truth, truth[:1], truth), strict=True):
        answer = client.completions.create(model="mx-tiny", prompt=prompt, max_tokens=8, temperature=0)
        assert [choice.text for choice in answer.choices] == list(texts)
        assert [choice.index for choice in answer.choices] == list(range(len(texts)))
    both = client.completions.create(
        model="mx-tiny", prompt=[PROMPT, OTHER], n=2, max_tokens=8, temperature=0
    )
    assert [choice.text for choice in both.choices] == [truth[0], truth[0], truth[1], truth[1]]
    assert both.usage is not None
    assert both.usage.prompt_tokens == len(ids[0]) + len(ids[1])
    assert both.usage.completion_tokens == 32


def test_seeds_repeat_and_n_answers_differ(client: OpenAI) -> None:
    def ask(seed: int | None, n: int = 3) -> list[str]:
        answer = client.completions.create(model="mx-tiny", prompt=PROMPT, max_tokens=12, seed=seed, n=n)
        return [choice.text for choice in answer.choices]

    first = ask(5)
    assert len(set(first)) == 3
    assert ask(5) == first
    assert ask(6, 2) == first[1:]  # answer i has the seed + i
    assert ask(None) != ask(None)
    assert ask(-3) == ask(-3)


def test_top_p_and_temperature_narrow_the_choice(client: OpenAI, local: Any) -> None:
    greedy = expected(local, PROMPT, 12)
    settings: list[dict[str, Any]] = [
        {"top_p": 1e-6},
        {"temperature": 1e-3},
        {"temperature": 0},
        {"top_p": 0},
    ]
    for narrow in settings:
        answer = client.completions.create(model="mx-tiny", prompt=PROMPT, max_tokens=12, **narrow)
        assert answer.choices[0].text == greedy


def test_stop_texts_and_the_end(client: OpenAI, local: Any) -> None:
    whole = expected(local, PROMPT, 40)
    word = whole.split()[4]
    cut = client.completions.create(
        model="mx-tiny", prompt=PROMPT, max_tokens=40, temperature=0, stop=["never", word]
    )
    assert cut.choices[0].text == whole[: whole.index(word)]
    assert cut.choices[0].finish_reason == "stop"
    ended = client.chat.completions.create(model="mx-tiny", messages=CHAT, temperature=0)
    assert ended.choices[0].finish_reason == "stop"


def test_log_probabilities_are_those_of_the_text(client: OpenAI, local: Any) -> None:
    whole = expected(local, PROMPT, 40)
    words = whole.split()
    for stop in (" " + words[5], words[5][1:], f"{words[4]} {words[5]} {words[6]}"):
        asked: dict[str, Any] = {"model": "mx-tiny", "prompt": PROMPT, "max_tokens": 40, "temperature": 0}
        choice = client.completions.create(**asked, stop=stop, logprobs=0).choices[0]
        assert choice.text == whole[: whole.index(stop)] and choice.logprobs is not None
        tokens = choice.logprobs.tokens
        assert tokens is not None and len("".join(tokens[:-1])) < len(choice.text)
        assert "".join(tokens).startswith(choice.text)  # the last may go on into the stop text
        text, streamed = "", []
        for chunk in client.completions.create(**asked, stop=stop, logprobs=0, stream=True):
            for part in chunk.choices:
                text += part.text
                streamed += (part.logprobs.tokens or []) if part.logprobs else []
                # Nothing that may still be cut off is told.
                assert len("".join(streamed[:-1])) <= len(text)
        assert (text, streamed) == (choice.text, tokens)


def test_offsets_count_characters(client: OpenAI) -> None:
    prompt = "Anna 😀 Ж née in 北京."
    choice = client.completions.create(
        model="mx-tiny", prompt=prompt, max_tokens=6, temperature=0, echo=True, logprobs=0
    ).choices[0]
    assert choice.logprobs is not None and choice.text.startswith(prompt)
    tokens, offsets = choice.logprobs.tokens, choice.logprobs.text_offset
    assert tokens is not None and offsets is not None
    assert any(token.startswith("bytes:") for token in tokens)  # characters of several tokens
    for token, offset in zip(tokens[1:], offsets[1:], strict=True):
        assert token.startswith("bytes:") or choice.text[offset : offset + len(token)] == token


def test_the_drawn_token_is_among_the_likeliest_ones_that_are_told(client: OpenAI) -> None:
    choice = client.completions.create(
        model="mx-tiny", prompt=PROMPT, max_tokens=30, temperature=2, seed=3, logprobs=2
    ).choices[0]
    found = choice.logprobs
    assert found is not None and found.tokens and found.top_logprobs and found.token_logprobs
    for token, logprob, top in zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True):
        assert top is not None and top[token] == logprob and len(top) in (2, 3)
    assert any(len(top or ()) == 3 for top in found.top_logprobs)


def test_a_prompt_that_fills_the_context_can_be_scored(client: OpenAI) -> None:
    asked: dict[str, Any] = {"model": "mx-tiny", "prompt": [7] * 512, "echo": True, "logprobs": 0}
    answer = client.completions.create(**asked, max_tokens=0)
    assert answer.usage is not None and answer.usage.prompt_tokens == 512
    for n in (1, None):
        with pytest.raises(openai.BadRequestError) as error:
            client.completions.create(**asked, **({} if n is None else {"max_tokens": n}))
        assert error.value.code == "context_length_exceeded"


def test_echo_and_logprobs(client: OpenAI, local: Any) -> None:
    ids = encode_prompt(local.tokenizer, PROMPT)
    answer = client.completions.create(
        model="mx-tiny", prompt=PROMPT, max_tokens=5, temperature=0, echo=True, logprobs=2
    )
    choice = answer.choices[0]
    assert choice.text == PROMPT + expected(local, PROMPT, 5)
    found = choice.logprobs
    assert found is not None
    assert found.tokens is not None and found.token_logprobs is not None
    assert found.top_logprobs is not None and found.text_offset is not None
    assert len(found.tokens) == len(ids) + 5 == len(found.token_logprobs) == len(found.top_logprobs)
    assert found.token_logprobs[0] is None
    for token, offset in zip(found.tokens[1:], found.text_offset[1:], strict=True):
        assert choice.text[offset : offset + len(token)] == token
    assert "".join(found.tokens[len(ids) :]) == choice.text[len(PROMPT) :]
    with torch.no_grad():
        shares = local.model(torch.tensor([ids])).logits[0].log_softmax(-1)
    for i in range(1, len(ids)):
        assert found.token_logprobs[i] == pytest.approx(float(shares[i - 1, ids[i]]), abs=1e-4)
        assert max(found.top_logprobs[i].values()) == pytest.approx(float(shares[i - 1].max()), abs=1e-4)
    scored = client.completions.create(model="mx-tiny", prompt=ids, max_tokens=0, echo=True, logprobs=0)
    assert scored.choices[0].logprobs is not None
    assert scored.choices[0].logprobs.token_logprobs == found.token_logprobs[: len(ids)]
    assert scored.usage is not None
    assert scored.usage.completion_tokens == 0


def test_streamed_completion(client: OpenAI, local: Any) -> None:
    chunks = list(
        client.completions.create(
            model="mx-tiny",
            prompt=[PROMPT, OTHER],
            max_tokens=12,
            temperature=0,
            logprobs=1,
            echo=True,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 24
    for i, prompt in enumerate((PROMPT, OTHER)):
        own = [c for chunk in chunks[:-1] for c in chunk.choices if c.index == i]
        assert "".join(c.text for c in own) == prompt + expected(local, prompt, 12)
        assert [c.finish_reason for c in own if c.finish_reason] == ["length"]
        tokens = [t for c in own if c.logprobs for t in c.logprobs.tokens or ()]
        assert len(tokens) == len(encode_prompt(local.tokenizer, prompt)) + 12
        offsets = [t for c in own if c.logprobs for t in c.logprobs.text_offset or ()]
        assert offsets == sorted(offsets)


def test_chat(client: OpenAI, local: Any) -> None:
    answer = client.chat.completions.create(
        model="mx-tiny", messages=CHAT, max_completion_tokens=8, temperature=0, logprobs=True, top_logprobs=2
    )
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == expected(local, CHAT, 8)
    assert choice.logprobs is not None and choice.logprobs.content is not None
    assert "".join(one.token for one in choice.logprobs.content) == choice.message.content
    for one in choice.logprobs.content:
        assert one.token == one.top_logprobs[0].token  # greedy
        assert one.top_logprobs[0].logprob >= one.top_logprobs[1].logprob
        assert bytes(one.bytes or ()).decode() == one.token
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(encode_prompt(local.tokenizer, CHAT))
    parts = [
        {"role": "developer", "content": "Be kind."},
        {**CHAT[1], "content": [{"type": "text", "text": CHAT[1]["content"]}]},
    ]
    same = client.chat.completions.create(model="mx-tiny", messages=parts, max_tokens=8, temperature=0)
    assert same.choices[0].message.content == choice.message.content
    again = [*CHAT, choice.message, {"role": "user", "content": "And of Italy?"}]
    assert client.chat.completions.create(
        model="mx-tiny", messages=again, max_tokens=4, temperature=0
    ).choices


def test_a_chat_goes_on_with_its_last_message(client: OpenAI, local: Any) -> None:
    started: list[Any] = [*CHAT, {"role": "assistant", "content": "The capital"}]
    asked: dict[str, Any] = {"model": "mx-tiny", "messages": started, "max_tokens": 8, "temperature": 0}
    going_on = expected(local, Chat(started, continue_final_message=True), 8)
    for fields in ({}, {"add_generation_prompt": False}, {"chat_template_kwargs": {"unknown": 1}}):
        answer = client.chat.completions.create(
            **asked, extra_body={"continue_final_message": True, **fields}
        )
        assert answer.choices[0].message.content == going_on
    answered = client.chat.completions.create(**asked)
    assert answered.choices[0].message.content == expected(local, started, 8)
    bare = client.chat.completions.create(**asked, extra_body={"add_generation_prompt": False})
    right = expected(local, Chat(started, add_generation_prompt=False), 8)
    assert bare.choices[0].message.content == right
    for fields in (
        {"continue_final_message": True, "add_generation_prompt": True},
        {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}},
        {"chat_template_kwargs": 3},
    ):
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(**asked, extra_body=fields)


def test_a_stop_text_may_be_a_special_token(client: OpenAI) -> None:
    asked: dict[str, Any] = {"model": "mx-tiny", "prompt": PROMPT, "max_tokens": 5, "temperature": 0}
    asked["logit_bias"] = {"3": 100}  # <|user|>, and nothing else
    assert client.completions.create(**asked).choices[0].finish_reason == "length"
    for stop, n in (("<|user|>", 1), ("<|user|><|user|>", 2)):
        answer = client.completions.create(**asked, stop=stop)
        assert answer.choices[0].finish_reason == "stop" and answer.choices[0].text == ""
        assert answer.usage is not None and answer.usage.completion_tokens == n
        *_, last = client.completions.create(**asked, stop=stop, stream=True)
        assert last.choices[0].finish_reason == "stop"


def test_streamed_chat(client: OpenAI, local: Any) -> None:
    with client.chat.completions.create(
        model="mx-tiny", messages=CHAT, max_tokens=10, temperature=0, stream=True, n=2
    ) as stream:
        chunks = list(stream)
    for i in range(2):
        own = [c for chunk in chunks for c in chunk.choices if c.index == i]
        assert own[0].delta.role == "assistant"
        assert "".join(c.delta.content or "" for c in own) == expected(local, CHAT, 10)
        assert own[-1].finish_reason == "length"
    assert all(chunk.usage is None for chunk in chunks)


def test_async_client(server: ServerProcess, local: Any) -> None:
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="k", max_retries=0) as client:

            async def whole(prompt: str) -> str:
                answer = await client.completions.create(
                    model="mx-tiny", prompt=prompt, max_tokens=10, temperature=0
                )
                return answer.choices[0].text

            async def streamed(messages: Any) -> str:
                stream = await client.chat.completions.create(
                    model="mx-tiny", messages=messages, max_tokens=10, temperature=0, stream=True
                )
                return "".join([c.choices[0].delta.content or "" async for c in stream])

            return list(await asyncio.gather(whole(PROMPT), streamed(CHAT), whole(OTHER), streamed(CHAT)))

    chat = expected(local, CHAT, 10)
    assert asyncio.run(ask()) == [expected(local, PROMPT, 10), chat, expected(local, OTHER, 10), chat]


def test_steering_by_vector(client: OpenAI, local: Any, vectors: Any) -> None:
    vector = vectors[1]["calm_angry"]
    plain, steered = expected(local, PROMPT, 20), expected(local, PROMPT, 20, vector, -2.0)
    assert plain != steered
    spelled: list[dict[str, Any]] = [
        {"steering_vector": "calm_angry", "steering_strength": -2},
        {"steering_vector_id": "calm_angry", "steering_strength": -2.0},
        {"steering": [{"vector": "calm_angry", "strength": -2}]},
        {"steering": [{"vector": "calm_angry", "strength": -2, "layers": [4], "tokens": [0, None]}]},
        {"steering": [{"vector": "calm_angry", "strength": -1}, {"vector": "calm_angry", "strength": -1}]},
        {"behavior_names": ["calm_angry"], "steering_strength": -2},
        {"force_steering": ["calm_angry"], "steering_strength": -2},
    ]
    for extra in spelled:
        answer = client.completions.create(
            model="mx-tiny", prompt=PROMPT, max_tokens=20, temperature=0, extra_body=extra
        )
        assert answer.choices[0].text == steered, extra
    chat = client.chat.completions.create(
        model="mx-tiny", messages=CHAT, max_tokens=8, temperature=0, extra_body=spelled[0]
    )
    assert chat.choices[0].message.content == expected(local, CHAT, 8, vector, -2.0)
    unsteered: list[dict[str, Any]] = [
        {"steering_vector": "calm_angry", "steering_strength": 0},
        {"steering": [{"vector": "calm_angry", "strength": -2, "tokens": [400, None]}]},
        {"steering": []},
        {"steering_vector": None, "steering_strength": 0, "behavior_names": []},
    ]
    for extra in unsteered:
        answer = client.completions.create(
            model="mx-tiny", prompt=PROMPT, max_tokens=20, temperature=0, extra_body=extra
        )
        assert answer.choices[0].text == plain, extra


WRONG: list[tuple[dict[str, Any], str | None, str]] = [
    ({"steering_vector": "nope"}, "steering_vector", "nope"),
    ({"steering_vector": "../../etc/passwd"}, "steering_vector", "id"),
    ({"steering_condition": {"vector": "market", "threshold": 0}}, None, "goes with"),
    (
        {"steering_vector": "calm_angry", "steering_condition": {"vector": "nope", "threshold": 0}},
        "steering_condition",
        "nope",
    ),
    (
        {"steering_vector": "calm_angry", "steering_condition": {"vector": "market", "threshold": 2}},
        "steering_condition",
        "less than or equal to 1",
    ),
    ({"steering": [{"vector": "nope"}]}, "steering", "nope"),
    ({"steering": [{"vector": "calm_angry", "layers": [1]}]}, "steering", "layers"),
    ({"steering": [{"vector": "calm_angry", "layers": [99]}]}, "steering", "99"),
    ({"steering": [{"vector": "calm_angry", "tokens": [0, 5, 0]}]}, "steering", "step"),
    ({"steering": [{"vector": "calm_angry", "tokens": [1]}]}, "steering", "range"),
    ({"steering": [{"strength": 1}]}, "steering", "vector"),
    ({"steering_strength": 2}, "steering_strength", "nothing to steer with"),
    ({"steering_vector": "calm_angry", "steering_strength": "2"}, "steering_strength", "number"),
    ({"steering_vector": "calm_angry", "steering_vector_id": "kind_rude"}, None, "different vectors"),
    ({"behavior_names": ["nope"]}, "behavior_names", "nope"),
    ({"force_steering": ["nope"]}, "force_steering", "nope"),
    ({"topk": 3}, "topk", "Unrecognized request argument"),
    ({"top_k": -2}, "top_k", "greater"),
    ({"temperature": 3}, "temperature", "less than or equal to 2"),
    ({"max_tokens": -1}, "max_tokens", "greater"),
    ({"max_tokens": 1.5}, "max_tokens", "integer"),
    ({"max_tokens": 600}, "max_tokens", "maximum context length is 512"),
    ({"max_tokens": 0}, "max_tokens", "echo"),
    ({"n": 0}, "n", "greater"),
    ({"n": True}, "n", "integer"),
    ({"best_of": 5, "n": 6}, "best_of", "best_of"),
    ({"stop": ""}, "stop", "at least 1"),
    ({"logit_bias": {"x": 1}}, "logit_bias", "token ids"),
    ({"logit_bias": {"99999": 1}}, "logit_bias", "vocabulary"),
    ({"logit_bias": {"5": 500}}, "logit_bias", "100"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "stream"),
    ({"prompt": []}, "prompt", "empty"),
    ({"prompt": [[]]}, "prompt", "at least one token"),
    ({"prompt": [99999]}, "prompt", "vocabulary"),
    ({"prompt": [-1]}, "prompt", "0 or more"),
    ({"prompt": [10**40]}, None, ""),
    ({"prompt": {"a": 1}}, "prompt", "string"),
    ({"min_tokens": 9, "max_tokens": 8}, "min_tokens", ": min_tokens is at most max_tokens: got 9 and 8."),
    ({"min_tokens": 17}, "min_tokens", "17 and 16"),
    ({"prompt": "\ud800"}, None, ""),
]


@pytest.mark.parametrize(
    "body, param, text", WRONG, ids=[str(b)[:60].encode("ascii", "replace").decode() for b, _, _ in WRONG]
)
def test_wrong_requests_are_named(
    server: ServerProcess, body: dict[str, Any], param: str | None, text: str
) -> None:
    raw = json.dumps({"model": "mx-tiny", "prompt": PROMPT, **body}).encode()
    request = urllib.request.Request(
        f"{server.url}/v1/completions", raw, {"Content-Type": "application/json"}
    )
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=120)
    assert caught.value.code == 400
    error = json.loads(caught.value.read())["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert text in error["message"]
    assert param is None or error["param"] == param


def test_errors_are_the_sdks_own(client: OpenAI, server: ServerProcess) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model="mx-tiny", prompt=PROMPT, extra_body={"steering_vector": "nope"})
    assert bad.value.param == "steering_vector"
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-4", messages=CHAT)
    assert missing.value.code == "model_not_found"
    long = "and so on " * 600
    with pytest.raises(openai.BadRequestError) as full:
        client.completions.create(model="mx-tiny", prompt=long)
    assert full.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as tools:
        client.chat.completions.create(
            model="mx-tiny", messages=CHAT, tools=[{"type": "function", "function": {"name": "f"}}]
        )
    assert tools.value.param == "tools"
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="mx-tiny", messages=[])
    with pytest.raises(openai.NotFoundError):
        OpenAI(base_url=f"{server.url}/v1", api_key="k", max_retries=0).images.generate(prompt="a")


def test_a_failure_in_the_middle_of_a_stream_is_an_error_of_the_sdk(client: OpenAI) -> None:
    # Each is a legal vector at a legal strength; together, from the 20th token on, they overflow.
    item = {"vector": "huge", "strength": 3, "tokens": [20, None]}
    stream = client.completions.create(
        model="mx-tiny",
        prompt=PROMPT,
        max_tokens=60,
        temperature=0,
        stream=True,
        logit_bias={"1": -100, "5": -100},
        extra_body={"steering": [item, item]},
    )
    text = ""
    with pytest.raises(openai.APIError, match="not finite"):
        for chunk in stream:
            text += chunk.choices[0].text
    assert text
    assert client.completions.create(model="mx-tiny", prompt=PROMPT, max_tokens=1).choices


def test_fields_that_change_nothing_are_taken(client: OpenAI) -> None:
    """What clients commonly send and what changes nothing is taken."""
    answer = client.chat.completions.create(
        model="mx-tiny",
        messages=[{"role": "user", "content": "Hello", "name": "anna"}],
        max_tokens=2,
        user="u-1",
        metadata={"a": "b"},
        store=False,
        service_tier="auto",
        response_format={"type": "text"},
        tools=[],
        parallel_tool_calls=True,
    )
    assert answer.choices[0].message.content
