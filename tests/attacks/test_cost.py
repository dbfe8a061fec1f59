"""Requests that cost far more than they say: endless examples, answers of nothing but log-probabilities."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from server_calls import call
from server_process import ServerProcess, serving

from mechanex.server.http.answers import json_answer

pytestmark = [pytest.mark.ci, pytest.mark.slow]

KEY = "a-key-of-the-operator"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with serving(home=tmp_path_factory.mktemp("home"), environment={"MECHANEX_SERVER_KEY": KEY}) as running:
        yield running


def asked(server: ServerProcess, path: str, body: object) -> tuple[int, bytes]:
    status, _, told = call(server, "POST", path, body, x_api_key=KEY)
    return status, told


@pytest.mark.parametrize("path", ["/steering/generate", "/behaviors/create"])
def test_examples_longer_than_the_context_are_refused(server: ServerProcess, path: str) -> None:
    body = {
        "prompts": [[5] * 16_000],
        "positive_answers": [" yes"],
        "negative_answers": [" no"],
        "behavior_name": "b",
        "layer_idxs": [2],
        "method": "caa",
    }
    body.pop("behavior_name" if path.startswith("/steering") else "layer_idxs")
    if "layer_idxs" not in body:
        body.pop("method")
    status, told = asked(server, path, body)
    assert status == 400 and b"16003 tokens" in told, told
    body["prompts"], body["positive_answers"] = ["Anna"], [" yes" * 600]
    status, told = asked(server, path, body)
    assert status == 400 and b"context" in told, told


def test_more_log_probabilities_than_can_be_told_are_refused(server: ServerProcess) -> None:
    chat = {"messages": [{"role": "user", "content": "Anna"}], "logprobs": True, "top_logprobs": 20}
    status, told = asked(server, "/v1/chat/completions", chat | {"n": 128, "max_tokens": 400})
    assert status == 400 and b"1075200 log-probabilities" in told
    # Where no length was asked for, the answers end where there would be more.
    status, told = asked(server, "/v1/chat/completions", chat | {"n": 100, "temperature": 0})
    assert status == 200
    assert max(len(one["logprobs"]["content"]) for one in json.loads(told)["choices"]) <= 200_000 // 2100


def test_a_large_answer_is_written_beside_others(server: ServerProcess) -> None:
    body = {"prompt": "Anna", "n": 64, "max_tokens": 300, "logprobs": 5, "seed": 1}
    waits: list[float] = []
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            begun = time.monotonic()
            call(server, "GET", "/health")
            waits.append(time.monotonic() - begun)

    with ThreadPoolExecutor(1) as pool:
        looking = pool.submit(look)
        status, told = asked(server, "/v1/completions", body)
        done.set()
        looking.result()
    assert status == 200 and len(told) > 300_000
    found = json.loads(told)["choices"]
    assert len(found) == 64 and all(len(one["logprobs"]["tokens"]) for one in found)
    assert waits


@pytest.mark.parametrize("size", [None, 100_000])
def test_what_may_be_large_is_made_off_the_event_loop(size: int | None) -> None:
    made: list[int] = []

    def make() -> list[object]:
        made.append(threading.get_ident())
        return ["é", 1.5, None]

    large = asyncio.run(json_answer(make, size))
    small = asyncio.run(json_answer(make, 3))
    assert large.body == small.body == '["é",1.5,null]'.encode()
    assert made[0] != threading.get_ident() == made[1]


def test_an_echoed_prompt_is_streamed_with_what_the_whole_answer_tells(server: ServerProcess) -> None:
    body = {"prompt": [7] * 400, "n": 3, "max_tokens": 3, "logprobs": 20, "echo": True, "temperature": 0}
    status, told = asked(server, "/v1/completions", body)
    assert status == 200
    whole = [one["logprobs"]["token_logprobs"] for one in json.loads(told)["choices"]]
    status, told = asked(server, "/v1/completions", body | {"stream": True})
    assert status == 200
    streamed: dict[int, list[float]] = {}
    for line in told.decode().split("\n\n"):
        if line.startswith("data: {"):
            for choice in json.loads(line.removeprefix("data: "))["choices"]:
                found = (choice["logprobs"] or {}).get("token_logprobs", [])
                streamed.setdefault(choice["index"], []).extend(found)
    assert len(whole[0]) > 400 and [streamed[i] for i in range(3)] == whole
