"""What a server tells of the model's inside: bounded, right for vectors of any size, written beside other answers."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient

from mechanex.engine.models.resolve import load
from mechanex.engine.vectors import SteeringVector
from mechanex.server.app import create_app
from mechanex.server.openai.inspection import Inspection
from mechanex.server.openai.replies import Reply
from mechanex.server.settings import ServerSettings

DIRECTION = torch.randn(128, generator=torch.Generator().manual_seed(0))
SIZES = {"one": 1.0, "huge": 1e20, "tiny": 1e-30, "zero": 0.0, "vast": 1e34}
PROMPT = "Anna went to the market on Friday."


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    folder = tmp_path_factory.mktemp("vectors")
    for name, size in SIZES.items():
        SteeringVector({2: size * DIRECTION / DIRECTION.norm()}).save(folder / f"{name}.safetensors")
    tiny: Any = load("mx-tiny", backend="transformers")
    app = create_app(ServerSettings(host="127.0.0.1", vectors=folder), tiny)
    with TestClient(app, base_url="http://127.0.0.1") as running:
        yield running


def asked(client: TestClient, path: str = "/v1/completions", **body: Any) -> tuple[int, Any]:
    more = {} if path == "/v1/embeddings" else {"temperature": 0}
    told = client.post(path, json=more | body)
    return told.status_code, told.json()


def projections(*names: str, **more: Any) -> dict[str, Any]:
    return {"activations": [{"layer": 2, "vector_ids": [*names], **more}]}


ONE = {"steering_vector": "one"}
MANY: dict[str, dict[str, Any]] = {
    "projections": {"return": {"activations": projections("one", "huge", prompt=True)["activations"] * 32}},
    "differences": {"return": {"logit_differences": 20}, **ONE},
    "streams": {"return": projections("one", raw=True)},
    "both": {"return": {"logit_differences": 10, **projections("one", raw=True)}, **ONE},
}


@pytest.mark.parametrize("what", MANY)
def test_more_numbers_than_can_be_told_are_refused(client: TestClient, what: str) -> None:
    prompt = [7] * 400 if what == "projections" else PROMPT
    most = {"n": 128, "max_tokens": 100 if what == "projections" else 400, "prompt": prompt}
    status, told = asked(client, **MANY[what], **most)
    assert status == 400 and told["error"]["param"] == "return", told
    assert "numbers of the model's inside" in told["error"]["message"]
    # Few of them are told.
    status, told = asked(client, **MANY[what], prompt=PROMPT, max_tokens=2)
    assert status == 200, told


def test_scores_of_behaviors_count_too(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mechanex.server.openai.bounds.MOST_NUMBERS", 100)
    status, told = asked(client, prompt=PROMPT, max_tokens=101, behavior_scores=True)
    assert status == 400 and told["error"]["param"] == "behavior_scores"
    assert asked(client, prompt=PROMPT, max_tokens=10, behavior_scores=True)[0] == 200


def test_answers_of_no_asked_length_end_where_there_would_be_more(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mechanex.server.openai.bounds.MOST_NUMBERS", 130 * 10)
    chat = {"messages": [{"role": "user", "content": "Anna"}], "ignore_eos": True}
    status, told = asked(client, "/v1/chat/completions", **chat, **{"return": projections("one", raw=True)})
    assert status == 200 and len(told["choices"][0]["activations"][0]["raw"]) == 10


def test_projections_are_onto_directions_of_vectors_of_any_size(client: TestClient) -> None:
    body = {"prompt": PROMPT, "max_tokens": 3}
    _, told = asked(client, **body, **{"return": projections("one", "huge", "tiny")})
    one, huge, tiny = told["choices"][0]["activations"][0]["projections"].values()
    assert max(map(abs, one)) > 1e-3
    for other in (huge, tiny):
        assert all(math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-5) for a, b in zip(one, other, strict=True))
    status, told = asked(client, **body, **{"return": projections("one", "zero")})
    assert status == 400 and told["error"]["param"] == "return"
    assert "'zero' at layer 2" in told["error"]["message"] and "norm is 0.0" in told["error"]["message"]


def test_embeddings_of_huge_streams_have_norm_1_and_infinite_ones_are_an_error(client: TestClient) -> None:
    body = {"input": PROMPT, "layer": 2, "steering_vector": "huge"}
    status, told = asked(client, "/v1/embeddings", **body)
    found = torch.tensor(told["data"][0]["embedding"])
    assert status == 200 and torch.allclose(found, DIRECTION / DIRECTION.norm(), atol=1e-5)
    most = (
        3e38 / 1e34 / float((DIRECTION / DIRECTION.norm()).abs().max())
    )  # twice that is no number of float32
    twice = [{"vector": "vast", "strength": most}] * 2
    status, told = asked(client, "/v1/embeddings", input=PROMPT, layer=2, steering=twice)
    assert status == 400 and "not finite" in told["error"]["message"], told


def test_what_a_stream_returns_is_made_and_written_off_the_event_loop(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: dict[str, set[str]] = {"made": set(), "written": set()}
    made, written = Inspection._activations, Reply.chunk

    def activations(*given: Any) -> Any:
        threads["made"].add(threading.current_thread().name)
        return made(*given)

    def chunk(self: Reply, choices: Any, *given: Any, **more: Any) -> bytes:
        if any("activations" in one for one in choices):
            threads["written"].add(threading.current_thread().name)
        return written(self, choices, *given, **more)

    monkeypatch.setattr(Inspection, "_activations", activations)
    monkeypatch.setattr(Reply, "chunk", chunk)
    body = {"prompt": PROMPT, "max_tokens": 3, "stream": True, "return": projections("one", raw=True)}
    events = client.post("/v1/completions", json=body).text.split("\n\n")
    told = [json.loads(one.removeprefix("data: ")) for one in events if one and "[DONE]" not in one]
    assert len(told[-1]["choices"][0]["activations"][0]["raw"][0]) == 128
    for names in threads.values():
        assert names and not any(name.startswith("asyncio") for name in names)
