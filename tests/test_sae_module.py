"""Behaviors through the documented door: made here, kept, listed, watched and deleted, on this machine or a server."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from faulty_proxy import FaultyProxy, Status

import mechanex
from mechanex import Mechanex
from mechanex.bundled import data_path
from mechanex.engine.datasets import read_pairs
from mechanex.errors import APIError, MechanexError, NotFoundError, ValidationError

PAIRS = read_pairs(data_path("calm_angry"), split="train")
ANGER: dict[str, Any] = {
    "prompts": [str(prompt) for prompt in PAIRS.prompts[:24]],
    "positive_answers": PAIRS.negative_answers[:24],
    "negative_answers": PAIRS.positive_answers[:24],
}
PROMPT = 'Julia wrote a letter to Sara on Monday. "This makes me furious!"'
GREEDY: dict[str, Any] = {"sampling_method": "greedy"}


@pytest.fixture(scope="module")
def loaded() -> Mechanex:
    return Mechanex().load("mx-tiny", backend="transformers").set_execution_mode("local")


@pytest.fixture
def client(loaded: Mechanex) -> Mechanex:
    loaded.sae._kept = None
    return loaded.set_execution_mode("local")


def test_a_behavior_is_made_kept_watched_and_deleted(client: Mechanex, mechanex_home: Path) -> None:
    made = client.sae.create_behavior("anger", **ANGER, description="angry answers")
    assert made["behavior_name"] == "anger" and made["description"] == "angry answers"
    assert made["sae"] == "mx-tiny" and made["point"] == "resid.4" and len(made["features"]) <= 16
    assert made["features_figures"]["auroc"] > 0.97 and made["probe_figures"]["auroc"] > 0.97
    json.dumps(made)
    assert client.sae.list_behaviors() == [made]
    plain = client.generation.generate(PROMPT, 28, sampling_method="greedy")
    text = client.sae.generate(PROMPT, 28, ["anger"], **GREEDY)
    assert text.startswith(PROMPT) and text != plain
    assert client.sae.generate(PROMPT, 28, [], **GREEDY) == plain
    # None: all that are kept for this model.
    assert client.sae.generate(PROMPT, 28, **GREEDY) == text
    traced = client.sae.generate(PROMPT, 28, ["anger"], action="report", return_trace=True, **GREEDY)
    assert traced.text == plain and traced.detected == ("anger",)
    assert any(token.detected == ("anger",) for token in traced.trace)
    ended = client.sae.generate(PROMPT, 28, ["anger"], action="abort", return_trace=True, **GREEDY)
    assert ended.finish_reason == "behavior" and plain.startswith(ended.text)
    assert client.sae.generate(PROMPT, 28, [], ["anger"], **GREEDY) != plain
    client.sae.delete_behavior("anger")
    assert client.sae.list_behaviors() == [] and not list((mechanex_home / "behaviors").iterdir())


def test_another_process_finds_it(client: Mechanex) -> None:
    client.sae.create_behavior("anger", **ANGER)
    code = "import mechanex; print([b['behavior_name'] for b in mechanex.sae.list_behaviors()])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "['anger']", done.stderr


def test_a_file_of_examples_makes_one(client: Mechanex, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    lines = [
        {"prompt": p, "positive": a, "negative": b}
        for p, a, b in zip(*(ANGER[name] for name in ANGER), strict=True)
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    made = client.sae.create_behavior_from_jsonl("anger", path, detector="probe", correction="cap")
    assert made["detector"] == "probe" and made["correction"]["way"] == "cap" and made["features"] is None


def test_a_vector_of_ones_own_corrects(client: Mechanex) -> None:
    vector = client.steering.generate_vectors(
        ANGER["prompts"], ANGER["positive_answers"], ANGER["negative_answers"], [4], "caa"
    )
    made = client.sae.create_behavior("anger", **ANGER, steering_vector_id=vector, correction="subtract")
    assert made["steering_vector_id"] == vector
    with pytest.raises(NotFoundError, match=r"no steering vector has the id 'nothing'"):
        client.sae.create_behavior("other", **ANGER, steering_vector_id="nothing")
    assert [one["behavior_name"] for one in client.sae.list_behaviors()] == ["anger"]


def test_unknown_names_are_errors(client: Mechanex) -> None:
    for call in (
        lambda: client.sae.generate(PROMPT, 5, ["nothing"]),
        lambda: client.sae.generate(PROMPT, 5, [], ["nothing"]),
        lambda: client.sae.delete_behavior("nothing"),
        lambda: client.sae.explain("nothing", ["a text"]),
    ):
        with pytest.raises(NotFoundError, match=r"no behavior is called 'nothing'; there is: none"):
            call()
    with pytest.raises(ValidationError, match=r"sampling settings are .*; got \['top_q'\]"):
        client.sae.generate(PROMPT, 5, [], top_q=3)
    with pytest.raises(NotFoundError, match=r"there is no folder .*nowhere"):
        client.sae.create_behavior("anger", **ANGER, sae="nowhere")


def test_features_are_explained(client: Mechanex) -> None:
    client.sae.create_behavior("anger", **ANGER)
    texts = [p + a for p, a in zip(ANGER["prompts"], ANGER["positive_answers"], strict=True)]
    found = client.sae.explain("anger", texts, features=2, contexts=3)
    assert len(found) == 2 and all(1 <= len(one.contexts) <= 3 for one in found)


def test_without_a_model_it_says_what_to_do() -> None:
    fresh = Mechanex()
    assert fresh.sae.list_behaviors() == []
    with pytest.raises(MechanexError, match=r"sae.create_behavior needs a model: load one"):
        fresh.sae.create_behavior("anger", **ANGER)
    with pytest.raises(MechanexError, match=r"sae.generate needs a model: load one"):
        fresh.sae.generate("Hello")


def test_a_server_comes_first_and_this_machine_after_it(
    client: Mechanex, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.sae.create_behavior("anger", **ANGER)
    with FaultyProxy() as server:
        both = Mechanex(server.url, "a-key")
        both._loaded = client._loaded
        server.faults = [Status(200, '[{"behavior_name": "theirs"}]')]
        assert [one["behavior_name"] for one in both.sae.list_behaviors()] == ["theirs", "anger"]
        server.faults = [Status(200, '{"text": "from afar"}')]
        assert both.sae.generate("Hi", 5, ["theirs"]) == "from afar"
        # What is kept here can't be watched there.
        n = len(server.requests)
        assert both.sae.generate(PROMPT, 5, ["anger"]).startswith(PROMPT)
        assert len(server.requests) == n
        server.faults = [Status(501, '{"error": {"message": "not part of this version"}}')]
        with caplog.at_level(logging.WARNING):
            assert both.sae.generate("Hi", 5).startswith("Hi")
        assert "runs on the local model" in caplog.text
        alone = Mechanex(server.url, "a-key").set_execution_mode("remote")
        server.faults = [Status(501, '{"error": {"message": "not part of this version"}}')]
        with pytest.raises(APIError, match="not part of this version"):
            alone.sae.generate("Hi", 5)


def test_the_module_is_the_default_clients_door() -> None:
    assert mechanex.sae.explain.__self__ is mechanex.sae.generate.__self__
