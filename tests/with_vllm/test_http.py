"""vLLM's OpenAI API with steering fields: 16 clients at once, each answered as it is alone."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import requests
import torch
from models import Case, by_transformers

import mechanex
from mechanex.engine.intervention import Edit
from mechanex.engine.models.resolve import load
from mechanex.engine.sae.behavior import Behavior
from mechanex.engine.sae.corrections import Correction
from mechanex.engine.sae.detectors import ProbeDetector
from mechanex.engine.sae.generate import generate_watched
from mechanex.engine.sae.hook_points import HookPoint
from mechanex.engine.sae.store import write_behavior
from mechanex.engine.vectors import SteeringVector

KEY = "a key of sixteen characters"
ARGS = [
    "--enforce-eager",
    "--dtype=float32",
    "--block-size=32",
    "--max-num-batched-tokens=64",
    "--max-model-len=256",
]
GENERATOR = torch.Generator().manual_seed(3)
CALM, LOUD = (2 * torch.randn(128, generator=GENERATOR) for _ in range(2))


def behavior(name: str, direction: torch.Tensor, threshold: float) -> Behavior:
    direction = direction / direction.norm()
    probe, correction = ProbeDetector(direction, 0.0, 0.1), Correction("subtract", direction, 0.0, 0.5, 3.0)
    point = HookPoint("resid", 3)
    return Behavior(name, "", "mx-tiny", None, 128, point, "probe", probe, None, None, threshold, correction)


BEHAVIORS = [behavior("gruff", CALM, 70.0), behavior("shrill", LOUD, 200.0)]
STORY = "The baker said that the bread was warm, and the people of the city were glad to have it. " * 4


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("vectors")
    SteeringVector({1: CALM, 2: LOUD}).save(folder / "calm.safetensors")
    watched = tmp_path_factory.mktemp("behaviors")
    files = [watched / f"{one.name}.safetensors" for one in BEHAVIORS]
    for one, path in zip(BEHAVIORS, files, strict=True):
        write_behavior(one, path)
    settings = {"vllm_args": ARGS, "vectors": folder, "behaviors": files, "key": KEY}
    client = mechanex.Mechanex()
    with client.serve("mx-tiny", "127.0.0.1", 0, True, block=False, **settings) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Any) -> openai.OpenAI:
    register(server, "loud", {"2": LOUD.tolist()})
    register(server, "quiet", {"2": LOUD.tolist()}, edit="ablate")
    register(server, "level", {"3": CALM.tolist()}, edit="clamp", value=2.0)
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)


def register(server: Any, name: str, layers: dict[str, list[float]], **how: Any) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    body = {"id": name, "layers": layers, **how}
    answer = requests.post(f"{server.url}/v1/steering/vectors", json=body, headers=headers, timeout=60)
    assert answer.json() == {"id": name, "object": "steering_vector"}, answer.text


def clients() -> list[tuple[str, dict[str, Any], list[tuple[int, Edit, Any]]]]:
    """A prompt, the fields, and the edits that they mean."""
    asked: list[tuple[str, dict[str, Any], list[tuple[int, Edit, Any]]]] = []
    for i in range(16):
        prompt = (STORY if i % 3 == 0 else "") + f"What did the baker say on day {i % 5}?"
        strength = 0.5 + i / 8
        calm = [(1, Edit.add(CALM * strength), None), (2, Edit.add(LOUD * strength), None)]
        asked.append(
            [
                (prompt, {}, []),
                (prompt, {"steering_vector": "calm", "steering_strength": strength}, calm),
                (prompt, {"steering_vector_id": "quiet"}, [(2, Edit.ablate(LOUD), None)]),
                (
                    prompt,
                    {
                        "steering": [
                            {"vector": "loud", "strength": -strength, "tokens": [3, None]},
                            {"vector": "level"},
                        ]
                    },
                    [(2, Edit.add(-strength * LOUD), slice(3, None)), (3, Edit.clamp(CALM, 2.0), None)],
                ),
                (
                    prompt,
                    {"steering": [{"vector": "calm", "strength": strength, "layers": [1]}]},
                    [(1, Edit.add(CALM * strength), None)],
                ),
            ][i % 5]
        )
    return asked


def say(client: openai.OpenAI, prompt: str, fields: dict[str, Any]) -> str:
    answer = client.completions.create(
        model="mx-tiny",
        prompt=prompt,
        max_tokens=16,
        temperature=0,
        extra_body={"ignore_eos": True, **fields},
    )
    return str(answer.choices[0].text)


def test_sixteen_clients_at_once(client: openai.OpenAI) -> None:
    asked = clients()
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda one: say(client, *one[:2]), asked))
    assert together == [say(client, prompt, fields) for prompt, fields, _ in asked]
    loaded = load("mx-tiny", backend="transformers", dtype="float32")
    for (prompt, _, steers), text in zip(asked, together, strict=True):
        case = Case(tuple(loaded.tokenizer.encode(prompt)), None, tuple(steers))
        ids = by_transformers(loaded.model, case, 16)
        assert text == loaded.tokenizer.decode(ids, skip_special_tokens=True), (prompt[-20:], steers)


def test_chats_and_streams(client: openai.OpenAI) -> None:
    fields = {"steering_vector": "loud", "steering_strength": 2}
    asked: Any = {
        "model": "mx-tiny",
        "messages": [{"role": "user", "content": "What did the baker say?"}],
        "max_tokens": 12,
        "temperature": 0,
    }
    whole = client.chat.completions.create(**asked, extra_body=fields).choices[0].message.content
    parts = client.chat.completions.create(**asked, extra_body=fields, stream=True)
    assert whole == "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert whole != client.chat.completions.create(**asked).choices[0].message.content


ACTIONS: list[tuple[list[str], str]] = [
    (["gruff"], "correct"),
    (["gruff", "shrill"], "abort"),
    (["shrill", "gruff"], "report"),
]


@pytest.mark.parametrize(("names", "action"), ACTIONS)
def test_watched_answers(client: openai.OpenAI, names: list[str], action: Any) -> None:
    """As the engine watches them, scores included, whole and streamed."""
    loaded = load("mx-tiny", backend="transformers", dtype="float32")
    known = {one.name: one for one in BEHAVIORS}
    prompt = "The baker said that"
    (wanted,) = generate_watched(
        loaded.model,
        loaded.tokenizer,
        [prompt],
        [known[name] for name in names],
        action=action,
        max_tokens=24,
        sampling_method="greedy",
    )
    assert wanted.detected and (wanted.finish_reason == "behavior") == (action == "abort")
    asked: Any = {"model": "mx-tiny", "prompt": prompt, "max_tokens": 24, "temperature": 0}
    fields = {"behavior_names": names, "behavior_action": action}
    scored = client.completions.create(**asked, extra_body=fields | {"behavior_scores": True}).choices[0]
    plain = client.completions.create(**asked, extra_body=fields).choices[0]
    parts = list(
        client.completions.create(**asked, extra_body=fields | {"behavior_scores": True}, stream=True)
    )
    text = wanted.text.removeprefix(prompt)
    assert plain.text == scored.text == text == "".join(part.choices[0].text for part in parts)
    for choice in (plain, scored, parts[-1].choices[0]):
        assert choice.finish_reason == wanted.finish_reason
        assert not choice.model_extra.get("token_ids"), "nobody asked for them"
    for choice in (scored, parts[-1].choices[0]):
        found = choice.model_extra["behaviors"]
        assert found["detected"] == list(wanted.detected)
        assert [one["token"] for one in found["tokens"]] == [one.text for one in wanted.trace]
        for one, other in zip(found["tokens"], wanted.trace, strict=True):
            assert one["scores"] == pytest.approx(dict(other.scores), abs=1e-2)
            assert (one["detected"], one["corrected"]) == (list(other.detected), list(other.corrected))


def test_a_watched_chat(client: openai.OpenAI) -> None:
    asked: Any = {
        "model": "mx-tiny",
        "messages": [{"role": "user", "content": "What did the baker say?"}],
        "max_tokens": 12,
        "temperature": 0,
        "extra_body": {"corrected_behaviors": ["gruff"], "behavior_scores": True, "steering_vector": "calm"},
    }
    whole = client.chat.completions.create(**asked).choices[0]
    parts = [part for part in client.chat.completions.create(**asked, stream=True) if part.choices]
    assert whole.message.content == "".join(part.choices[0].delta.content or "" for part in parts)
    assert whole.model_extra["behaviors"] == parts[-1].choices[0].model_extra["behaviors"]
    assert len(whole.model_extra["behaviors"]["tokens"]) == 12


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"steering_vector": "unheard_of"}, "unheard_of"),
        ({"steering": [{"vector": "unheard_of"}]}, "unheard_of"),
        ({"steering": [{"vector": "calm", "layers": [3]}]}, "layers"),
        ({"steering": [{"vector": "calm", "nonsense": 1}]}, "nonsense"),
        ({"steering": [{"vector": "calm"}] * 5}, "5 vectors"),
        ({"steering_strength": 2}, "nothing to steer with"),
        ({"steering_vector": "calm", "steering_strength": "much"}, "steering_strength"),
        ({"behavior_names": ["calm_angry"]}, "no behavior that can be watched is called 'calm_angry'"),
        ({"behavior_names": ["gruff"], "behavior_action": "steer"}, "not steered by"),
        ({"behavior_names": ["gruff"], "behavior_scores": True, "n": 2}, "one answer"),
        ({"behavior_names": ["gruff"], "behavior_scores": True, "n": "2"}, "one answer"),
        ({"behavior_scores": True}, "name some"),
        (
            {"behavior_names": ["gruff"], "steering_vector": "calm", "steering_strength": 2},
            "not steered by",
        ),
        ({"force_steering": ["gruff"]}, "force_steering"),
        ({"return": {"logit_differences": 3}}, "return is not served"),
        ({"guided_regex": "a+"}, "structured_outputs"),
        (
            {"steering_vector": "calm", "steering_condition": {"vector": "calm", "threshold": 0}},
            "on a condition",
        ),
        ({"steering_vector": "calm", "use_beam_search": True, "n": 2}, "beam search"),
        ({"behavior_names": ["gruff"], "use_beam_search": True, "n": 2}, "beam search"),
        ({"vllm_xargs": {"mechanex_watch": "[]"}}, "vllm_xargs"),
        ({"vllm_xargs": {"mechanex": "[]"}}, "vllm_xargs"),
    ],
)
def test_what_is_refused(client: openai.OpenAI, fields: dict[str, Any], text: str) -> None:
    with pytest.raises(openai.BadRequestError, match=text):
        say(client, "Hello", fields)


def test_steering_at_another_address_is_refused(server: Any) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    body = {"model": "mx-tiny", "input": "Hello", "steering_vector": "calm"}
    answer = requests.post(f"{server.url}/v1/responses", json=body, headers=headers, timeout=60)
    assert answer.status_code == 400 and "not steered" in answer.json()["error"]["message"]


def test_vectors_come_and_go(server: Any, client: openai.OpenAI) -> None:
    headers = {"x-api-key": KEY}
    register(server, "passing", {"1": CALM.tolist()})
    steered = say(client, "Hello", {"steering_vector": "passing", "steering_strength": 2})
    register(server, "passing", {"1": LOUD.tolist()})
    assert say(client, "Hello", {"steering_vector": "passing", "steering_strength": 2}) != steered
    listed = requests.get(f"{server.url}/v1/steering/vectors", headers=headers, timeout=60).json()
    assert "passing" in [one["id"] for one in listed["data"]]
    gone = requests.delete(f"{server.url}/v1/steering/vectors/passing", headers=headers, timeout=60)
    assert gone.json() == {"deleted": True}
    with pytest.raises(openai.BadRequestError, match="passing"):
        say(client, "Hello", {"steering_vector": "passing"})


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"layers": {"1": [1.0]}}, "1 wide"),
        ({"layers": {"9": [1.0] * 128}}, "layers are 0 to 6"),
        ({"layers": {}}, "layers"),
        ({"layers": {"x": [1.0] * 128}}, "numbers"),
        ({"id": "calm", "layers": {"1": [1.0] * 128}}, "the server's own"),
        ({"layers": {"1": [0.0] * 128}, "edit": "ablate"}, "direction"),
    ],
)
def test_vectors_that_are_refused(server: Any, body: dict[str, Any], text: str) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    answer = requests.post(f"{server.url}/v1/steering/vectors", json=body, headers=headers, timeout=60)
    assert answer.status_code == 400 and text in answer.json()["error"]["message"], answer.text


def test_the_key_opens_everything_but_health(server: Any) -> None:
    assert requests.get(f"{server.url}/health", timeout=60).status_code == 200
    for method, path in (
        ("GET", "/v1/models"),
        ("GET", "/v1/steering/vectors"),
        ("POST", "/v1/steering/vectors"),
        ("POST", "/v1/completions"),
        ("POST", "/invocations"),
        ("GET", "/metrics"),
    ):
        answer = requests.request(method, f"{server.url}{path}", timeout=60)
        assert answer.status_code == 401, path
    listed = requests.get(f"{server.url}/v1/models", headers={"x-api-key": KEY}, timeout=60)
    assert listed.status_code == 200


def test_the_command_serves_until_it_is_told_to_end(tmp_path: Path) -> None:
    command = ["serve", "mx-tiny", "--use-vllm", "--host=127.0.0.1", "--port=0", "--dtype=float32"]
    options = [f"--vllm-arg={one}" for one in ARGS if "dtype" not in one]
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "mechanex.cli", *command, *options], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        said = next(line for line in process.stdout if line.startswith("Serving mx-tiny with vLLM at "))
        client = openai.OpenAI(base_url=f"{said.split()[5]}/v1", api_key="any", max_retries=0)
        assert say(client, "What did the baker say?", {})
        process.send_signal(signal.SIGTERM)
        process.stdout.read()
        assert process.wait(60) == 0
    finally:
        process.kill()


def test_settings_that_vllm_has_not(tmp_path: Path) -> None:
    with pytest.raises(mechanex.ValidationError, match="no corrected_behaviors"):
        mechanex.Mechanex().serve("mx-tiny", use_vllm=True, corrected_behaviors=["calm"])
