"""Behaviors on a server: made, kept, watched and corrected in the shared batch as the local engine does it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from argon2 import PasswordHasher
from fastapi.testclient import TestClient
from sqlalchemy import event

from mechanex import Mechanex
from mechanex.bundled import data_path
from mechanex.engine.datasets import read_pairs
from mechanex.engine.decode.decoder import Decoder
from mechanex.engine.models.resolve import LoadedModel, load
from mechanex.engine.sae.registry import for_model
from mechanex.errors import NotFoundError
from mechanex.server.accounts.passwords import Passwords
from mechanex.server.app import create_app
from mechanex.server.model.engine import ServingEngine
from mechanex.server.settings import ServerSettings

pytestmark = pytest.mark.slow

PAIRS = read_pairs(data_path("calm_angry"), split="train")
HELD = read_pairs(data_path("calm_angry"), split="heldout")
ANGER: dict[str, Any] = {
    "prompts": [str(prompt) for prompt in PAIRS.prompts[:24]],
    "positive_answers": PAIRS.negative_answers[:24],
    "negative_answers": PAIRS.positive_answers[:24],
}
PROVOKING = [
    str(prompt) + " ".join(answer.split(" ")[:5])
    for prompt, answer in zip(HELD.prompts[:6], HELD.negative_answers[:6], strict=True)
]
CREATE = ANGER | {"behavior_name": "anger", "description": "angry answers"}
N = 28


class Server:
    """An application of its own, and clients of it."""

    def __init__(self, model: LoadedModel, stack: ExitStack) -> None:
        self._model, self._stack = model, stack

    def start(self, **settings: Any) -> TestClient:
        app = create_app(ServerSettings(host="127.0.0.1", **settings), self._model)
        return self._stack.enter_context(TestClient(app, "http://localhost", raise_server_exceptions=False))


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return load("mx-tiny", backend="transformers")


@pytest.fixture(scope="module")
def local(model: LoadedModel) -> Mechanex:
    client = Mechanex().set_local_model(model.model, model.tokenizer).set_execution_mode("local")
    return client


@pytest.fixture
def server(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    cheap = PasswordHasher(time_cost=1, memory_cost=8, parallelism=1)
    monkeypatch.setattr("mechanex.server.accounts.store.Passwords", lambda: Passwords(cheap))
    with ExitStack() as stack:
        yield Server(model, stack)


@pytest.fixture(scope="module")
def served(model: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """An application that has the behavior "anger", for tests that leave nothing behind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MECHANEX_HOME", str(tmp_path_factory.mktemp("served")))
        app = create_app(ServerSettings(host="127.0.0.1"), model)
        with TestClient(app, "http://localhost", raise_server_exceptions=False) as client:
            assert client.post("/behaviors/create", json=CREATE).status_code == 200
            yield client


@pytest.fixture(scope="module")
def wanted(model: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """What the local engine answers, by what is done."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MECHANEX_HOME", str(tmp_path_factory.mktemp("local")))
        client = Mechanex().load("mx-tiny", backend="transformers").set_execution_mode("local")
        client.sae.create_behavior(
            "anger", ANGER["prompts"], ANGER["positive_answers"], ANGER["negative_answers"]
        )
        found: dict[str, list[Any]] = {
            action: [
                client.sae.generate(
                    prompt, N, ["anger"], action=action, return_trace=True, sampling_method="greedy"
                )
                for prompt in PROVOKING
            ]
            for action in ("correct", "abort", "report")
        }
        found["forced"] = [
            client.sae.generate(p, N, [], ["anger"], return_trace=True, sampling_method="greedy")
            for p in PROVOKING
        ]
        return found


def watched(client: TestClient, prompt: str, **fields: Any) -> dict[str, Any]:
    body = {"prompt": prompt, "max_new_tokens": N, "sampling_method": "greedy", **fields}
    answer = client.post("/sae/generate", json=body)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def completed(client: TestClient, prompt: Any, **fields: Any) -> list[dict[str, Any]]:
    body = {"prompt": prompt, "max_tokens": N, "temperature": 0, **fields}
    answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return list(answer.json()["choices"])


@pytest.mark.ci
def test_the_server_says_what_the_local_engine_says(served: TestClient, wanted: dict[str, list[Any]]) -> None:
    for action in ("correct", "abort", "report"):
        for prompt, own in zip(PROVOKING[:3], wanted[action], strict=False):
            told = watched(served, prompt, behavior_names=["anger"], action=action, return_trace=True)
            assert told["text"] == own.text and told["finish_reason"] == own.finish_reason
            assert told["detected"] == list(own.detected) and len(told["trace"]) == len(own.trace)
            for one, other in zip(told["trace"], own.trace, strict=True):
                assert one["text"] == other.text and one["corrected"] == list(other.corrected)
                assert one["scores"] == pytest.approx(other.scores, abs=1e-3)
    assert any(one.finish_reason == "behavior" for one in wanted["abort"][:3])
    told = watched(served, PROVOKING[0], behavior_names=[], force_steering=["anger"])
    assert told["text"] == wanted["forced"][0].text
    # None is all of the account's.
    assert watched(served, PROVOKING[0])["text"] == wanted["correct"][0].text
    plain = watched(served, PROVOKING[0], behavior_names=[])
    assert plain["text"] == wanted["report"][0].text and plain["detected"] == []


def test_clients_with_different_behaviors_share_a_batch(
    served: TestClient, wanted: dict[str, list[Any]]
) -> None:
    ways: list[tuple[str, dict[str, Any]]] = [
        ("correct", {"behavior_names": ["anger"]}),
        ("abort", {"behavior_names": ["anger"], "action": "abort"}),
        ("report", {"behavior_names": []}),
        ("forced", {"behavior_names": [], "force_steering": ["anger"]}),
    ]
    asked = [(i, way, fields) for i in range(len(PROVOKING)) for way, fields in ways]
    with ThreadPoolExecutor(len(asked)) as pool:
        found = list(pool.map(lambda one: watched(served, PROVOKING[one[0]], **one[2]), asked))
    assert [one["text"] for one in found] == [wanted[way][i].text for i, way, _ in asked]
    rows = [line for line in served.get("/metrics").text.splitlines() if "batch_rows_bucket" in line]
    few, every = (float(next(r for r in rows if f'le="{le}"' in r).split()[-1]) for le in ("4.0", "+Inf"))
    assert every > few  # they were in one batch
    choices = completed(served, PROVOKING, behavior_names=["anger"])
    assert [p + c["text"] for p, c in zip(PROVOKING, choices, strict=True)] == [
        one.text for one in wanted["correct"]
    ]


def test_rows_with_different_behaviors_are_answered_as_alone(server: Server) -> None:
    client = server.start()
    rude = read_pairs(data_path("kind_rude"), split="train")
    examples = rude.prompts[:16], rude.negative_answers[:16], rude.positive_answers[:16]
    body = dict(zip(("prompts", "positive_answers", "negative_answers"), examples, strict=True))
    for made in (CREATE, body | {"behavior_name": "rude"}):
        assert client.post("/behaviors/create", json=made).status_code == 200
    ways: list[dict[str, Any]] = [
        {"behavior_names": ["anger"]},
        {"behavior_names": ["rude"]},
        {"behavior_names": ["rude", "anger"], "action": "report"},
        {"behavior_names": ["anger", "rude"], "action": "abort"},
        {"behavior_names": ["anger"], "force_steering": ["rude"]},
    ]
    held = read_pairs(data_path("kind_rude"), split="heldout")
    openings = [
        str(prompt) + " ".join(answer.split(" ")[:6])
        for prompt, answer in zip(held.prompts[:2], held.negative_answers[:2], strict=True)
    ]
    asked = [(p, way | {"return_trace": True}) for p in (*PROVOKING[:2], *openings) for way in ways]
    alone = [watched(client, prompt, **way) for prompt, way in asked]
    with ThreadPoolExecutor(len(asked)) as pool:
        together = list(pool.map(lambda one: watched(client, one[0], **one[1]), asked))
    for one, other in zip(together, alone, strict=True):
        assert (one["text"], one["detected"]) == (other["text"], other["detected"])
        for token, same in zip(one["trace"], other["trace"], strict=True):
            assert token["scores"] == pytest.approx(same["scores"], abs=1e-3)
    assert {name for one in alone for name in one["detected"]} == {"anger", "rude"}


def test_openai_completions_are_watched_and_tell_it(served: TestClient, wanted: dict[str, list[Any]]) -> None:
    prompt = PROVOKING[0]
    own = wanted["correct"][0]
    for fields in (
        {"behavior_names": ["anger"]},
        {"corrected_behaviors": ["anger"]},
        {"behavior_names": ["anger"], "behavior_action": "correct"},
    ):
        (choice,) = completed(served, prompt, behavior_scores=True, **fields)
        assert prompt + choice["text"] == own.text
        told = choice["behaviors"]
        assert told["detected"] == ["anger"] and len(told["tokens"]) == len(own.trace)
        for one, other in zip(told["tokens"], own.trace, strict=True):
            assert one["corrected"] == list(other.corrected) and one["detected"] == list(other.detected)
            assert one["scores"] == pytest.approx(other.scores, abs=1e-3)
    (ended,) = completed(served, prompt, behavior_names=["anger"], behavior_action="abort")
    assert ended["finish_reason"] == "behavior" and "behaviors" not in ended
    assert prompt + ended["text"] == wanted["abort"][0].text
    (plain,) = completed(served, prompt, behavior_scores=True)
    assert plain["behaviors"]["detected"] == [] and len(plain["behaviors"]["tokens"]) > 1
    assert all(token["scores"] == {} for token in plain["behaviors"]["tokens"])
    # Its vector can be added all the same.
    (one,) = completed(served, prompt, behavior_names=["anger"], steering_strength=1)
    (other,) = completed(served, prompt, behavior_names=["anger"], behavior_action="steer")
    assert one["text"] == other["text"] != plain["text"]
    (forced,) = completed(served, prompt, force_steering=["anger"])
    assert prompt + forced["text"] == wanted["forced"][0].text
    # Each of several answers has an onlooker of its own.
    several = completed(served, prompt, behavior_names=["anger"], behavior_scores=True, n=3)
    assert [len(c["behaviors"]["tokens"]) for c in several] == [len(own.trace)] * 3


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_streams_tell_scores_as_they_come(served: TestClient, path: str) -> None:
    text: dict[str, Any] = {"prompt": PROVOKING[0]}
    if "chat" in path:
        said = [{"role": "assistant", "content": PROVOKING[0]}]
        text = {"messages": said, "continue_final_message": True}
    body = {
        **text,
        "max_tokens": N,
        "temperature": 0,
        "behavior_names": ["anger"],
        "behavior_action": "report",
        "behavior_scores": True,
    }
    whole = served.post(path, json=body).json()["choices"][0]
    with served.stream("POST", path, json=body | {"stream": True}) as answer:
        events = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: {")]
    choices = [choice for one in events for choice in one["choices"]]
    told = [choice["behaviors"] for choice in choices if "behaviors" in choice]
    assert len(told) > 1 and choices[-1]["finish_reason"] == whole["finish_reason"]
    tokens = [token for one in told for token in one["tokens"]]
    assert len(tokens) == len(whole["behaviors"]["tokens"])
    for one, other in zip(tokens, whole["behaviors"]["tokens"], strict=True):
        assert one["token"] == other["token"]
        assert one["scores"] == pytest.approx(other["scores"], abs=1e-3)
    assert told[-1]["detected"] == whole["behaviors"]["detected"]


def test_all_of_a_senders_behaviors_are_looked_up_at_once(server: Server) -> None:
    client = server.start()
    for name in ("anger", "b", "c"):
        made = client.post("/behaviors/create", json=CREATE | {"behavior_name": name})
        assert made.status_code == 200, made.text
    app: Any = client.app
    state, asked = app.state, []
    event.listen(state.store.database._engine, "before_cursor_execute", lambda *call: asked.append(call[2]))
    found = asyncio.run(state.engine.steerings.watched.every(None))
    assert [one.name for one in found] == ["anger", "b", "c"]
    assert len([one for one in asked if one.startswith("SELECT")]) == 1, asked


def test_the_autoencoder_is_read_once(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, reads = ServingEngine(ServerSettings(), model), []

    def read(name: str) -> Any:
        reads.append(name)
        return for_model(name)

    monkeypatch.setattr("mechanex.server.model.engine.for_model", read)

    async def twice() -> list[Any]:
        return await asyncio.gather(engine.autoencoder(), engine.autoencoder())

    first, second = asyncio.run(twice())
    assert first is not None
    assert first is second and first[1] is second[1] and len(reads) == 1


def test_unknown_behaviors_are_errors(served: TestClient) -> None:
    for fields in ({"behavior_names": ["anger", "nope"]}, {"force_steering": ["nope"]}):
        answer = served.post("/sae/generate", json={"prompt": "The", **fields})
        assert answer.status_code == 404 and "'nope'" in answer.json()["detail"]
    for fields, said in (
        ({"behavior_names": ["nope"]}, "'nope'"),
        ({"corrected_behaviors": ["nope"]}, "'nope'"),
        ({"behavior_names": ["nope"], "behavior_action": "abort"}, "'nope'"),
        ({"behavior_action": "abort"}, "give some"),
        ({"corrected_behaviors": ["anger"], "behavior_action": "abort"}, "give one of them"),
    ):
        answer = served.post("/v1/completions", json={"prompt": "The", **fields})
        assert answer.status_code == 400 and said in answer.json()["error"]["message"], answer.text


def test_each_field_of_behaviors_means_the_same_beside_others(served: TestClient) -> None:
    prompt = PROVOKING[0]
    # What is taken out of every token, or steered by its vector, is watched too where that was asked for.
    for fields in (
        {"force_steering": ["anger"]},
        {"behavior_names": ["anger"], "behavior_action": "steer"},
    ):
        (both,) = completed(served, prompt, corrected_behaviors=["anger"], behavior_scores=True, **fields)
        assert all(set(token["scores"]) == {"anger"} for token in both["behaviors"]["tokens"][:-1])
    # behavior_action is about behavior_names: what is forced beside them may be a vector alone.
    few = {name: texts[:3] for name, texts in ANGER.items()} | {"behavior_name": "few"}
    assert served.post("/behaviors/create", json=few).status_code == 200
    try:
        (one,) = completed(
            served, prompt, behavior_names=["anger"], behavior_action="report", force_steering=["few"]
        )
        (other,) = completed(served, prompt, force_steering=["few"])
        assert one["text"] == other["text"]
        answer = served.post("/v1/completions", json={"prompt": "The", "force_steering": ["nope"]})
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "force_steering"
    finally:
        served.delete("/behaviors/few")


def test_behaviors_belong_to_their_account_and_outlive_the_server(
    server: Server, wanted: dict[str, list[Any]], mechanex_home: Path
) -> None:
    client = server.start()
    headers = []
    for name in ("ann", "bob"):
        who = {"email": f"{name}@example.org", "password": "correct horse"}
        token = client.post("/auth/signup", json=who).json()["session"]["access_token"]
        headers.append({"authorization": f"Bearer {token}"})
    ann, bob = headers
    made = client.post("/behaviors/create", json=CREATE, headers=ann).json()
    assert made["detector"] in ("features", "probe") and made["sae"] == "mx-tiny"
    assert made["features_figures"]["auroc"] > 0.97 and made["n_examples"] == 24
    again = server.start()  # another server over the same folder
    body = {"prompt": PROVOKING[0], "max_new_tokens": N, "sampling_method": "greedy"}
    named = body | {"behavior_names": ["anger"]}
    assert again.get("/behaviors", headers=ann).json() == [made]
    assert again.post("/sae/generate", json=named, headers=ann).json()["text"] == wanted["correct"][0].text
    assert again.post("/sae/generate", json=named, headers=bob).status_code == 404
    assert again.post("/sae/generate", json=body, headers=bob).json()["text"] == wanted["report"][0].text
    (file,) = (mechanex_home / "server" / "behaviors").iterdir()
    file.write_bytes(file.read_bytes()[:-9])
    third = server.start()
    answer = third.post("/sae/generate", json=named, headers=ann)
    assert answer.status_code == 500 and "is damaged on the server" in answer.json()["detail"]
    assert third.delete("/behaviors/anger", headers=ann).status_code == 204
    assert not list((mechanex_home / "server" / "behaviors").iterdir())


def test_examples_that_do_not_separate_keep_nothing(server: Server, mechanex_home: Path) -> None:
    client = server.start()
    same = CREATE | {"negative_answers": ANGER["positive_answers"]}
    answer = client.post("/behaviors/create", json=same)
    assert answer.status_code == 400, answer.text
    assert client.get("/behaviors").json() == client.get("/steering/vectors").json() == []
    files = [p for p in (mechanex_home / "server").rglob("*") if p.is_file()]
    assert [p.suffix for p in files] == [".lock"]  # the running server's own
    few = {name: texts[:3] for name, texts in ANGER.items()} | {"behavior_name": "few"}
    assert client.post("/behaviors/create", json=few).json()["detector"] is None
    answer = client.post("/sae/generate", json={"prompt": "The", "behavior_names": ["few"]})
    assert answer.status_code == 404 and "four examples" in answer.json()["detail"]


def test_the_operators_behaviors_are_watched_for_everyone(
    server: Server, local: Mechanex, wanted: dict[str, list[Any]], mechanex_home: Path
) -> None:
    local.sae._kept = None
    local.sae.create_behavior("anger", *(ANGER[name] for name in ANGER), sae="mx-tiny")
    # Kept on this machine: the operator's, who is everyone here.
    client = server.start(corrected_behaviors=("anger",))
    told = watched(client, PROVOKING[0], behavior_names=["anger"])
    assert told["text"] == wanted["correct"][0].text
    output = client.post(
        "/generate", json={"prompt": PROVOKING[0], "max_tokens": N, "sampling_method": "greedy"}
    ).json()["output"]
    assert output == wanted["correct"][0].text
    (choice,) = completed(client, PROVOKING[0], behavior_scores=True)
    assert PROVOKING[0] + choice["text"] == output and choice["behaviors"]["detected"] == ["anger"]
    # What a request names comes on top: nothing takes the correction away.
    assert client.post("/behaviors/create", json=CREATE | {"behavior_name": "rage"}).status_code == 200
    for fields in (
        {"behavior_names": ["rage"], "behavior_action": "report"},
        {"behavior_names": ["anger"], "behavior_action": "report"},
        {"behavior_names": ["rage"], "steering_strength": 0},
    ):
        (choice,) = completed(client, PROVOKING[0], **fields)
        assert PROVOKING[0] + choice["text"] == output
    for names in ([], ["rage"]):
        assert watched(client, PROVOKING[0], behavior_names=names, action="report")["text"] == output
    (choice,) = completed(client, PROVOKING[0], behavior_names=["anger"], behavior_action="abort")
    assert choice["finish_reason"] == "behavior"
    assert client.delete("/behaviors/rage").status_code == 204
    file = mechanex_home / "behaviors" / "anger.safetensors"
    moved = file.rename(mechanex_home / "rage.safetensors")
    other = server.start(behaviors=(moved,))
    assert watched(other, PROVOKING[0], behavior_names=["rage"])["detected"] == ["rage"]
    answer = other.post("/behaviors/create", json=CREATE | {"behavior_name": "rage"})
    assert answer.status_code == 400 and "the server's own" in answer.json()["detail"]
    with pytest.raises(NotFoundError, match="there is no file"):
        server.start(behaviors=(mechanex_home / "gone.safetensors",))


@pytest.mark.ci
def test_rows_that_make_way_are_corrected_as_before(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    body = {"max_tokens": 160, "logit_bias": {"1": -100, "5": -100}}  # no end
    asked = body | {"behavior_names": ["anger"], "behavior_scores": True}
    ample = server.start()
    assert ample.post("/behaviors/create", json=CREATE).status_code == 200
    alone = [completed(ample, prompt, **asked)[0] for prompt in PROVOKING[:2]]
    # Room for both at first, then the second makes way, and is read again with what was corrected in it.
    client = server.start(max_cache_tokens=300, prefix_bytes=0)
    n_read: list[int] = []
    read = Decoder.read

    def noted(self: Decoder, rows: Any) -> Any:
        n_read.extend(len(row.chosen) for row in rows)
        return read(self, rows)

    monkeypatch.setattr(Decoder, "read", noted)
    for choice, own in zip(completed(client, PROVOKING[:2], **asked), alone, strict=True):
        assert choice["text"] == own["text"]
        tokens, others = choice["behaviors"]["tokens"], own["behaviors"]["tokens"]
        assert [one["corrected"] for one in tokens] == [one["corrected"] for one in others]
        assert any(one["corrected"] for one in tokens[:100]) and len(tokens) == len(others) == 160
        for one, other in zip(tokens, others, strict=True):
            assert one["scores"] == pytest.approx(other["scores"], abs=2e-3)
    assert max(n_read) > 100


def test_corrected_answers_are_no_begin_of_others(server: Server, wanted: dict[str, list[Any]]) -> None:
    client = server.start()
    assert client.post("/behaviors/create", json=CREATE).status_code == 200
    (first,) = completed(client, PROVOKING[0], behavior_names=["anger"])
    longer = PROVOKING[0] + first["text"]
    (after,) = completed(client, longer, max_tokens=12)
    fresh = server.start(prefix_bytes=0)
    (alone,) = completed(fresh, longer, max_tokens=12)
    assert after["text"] == alone["text"]
    answer = client.post("/v1/completions", json={"prompt": longer, "max_tokens": 1, "temperature": 0}).json()
    own = client.app.state.engine.tokenizer  # type: ignore[attr-defined]
    assert answer["usage"]["prompt_tokens"] == len(own(longer)["input_ids"])


def test_a_client_of_the_server_gets_what_the_local_engine_says(
    model: LoadedModel, wanted: dict[str, list[Any]]
) -> None:
    with (
        Mechanex()
        .set_local_model(model.model, model.tokenizer)
        .serve(host="127.0.0.1", port=0, block=False) as running
    ):
        remote = Mechanex(running.url, "any").set_execution_mode("remote")
        made = remote.sae.create_behavior("anger", *(ANGER[name] for name in ANGER))
        assert [one["behavior_name"] for one in remote.sae.list_behaviors()] == ["anger"]
        assert made["threshold"] > 0
        for action in ("correct", "abort", "report"):
            own = wanted[action][0]
            settings: dict[str, Any] = {"action": action, "sampling_method": "greedy"}
            assert remote.sae.generate(PROVOKING[0], N, ["anger"], **settings) == own.text
            traced = remote.sae.generate(PROVOKING[0], N, ["anger"], return_trace=True, **settings)
            assert (traced.text, traced.finish_reason, traced.detected) == (
                own.text,
                own.finish_reason,
                own.detected,
            )
            assert [token.token for token in traced.trace] == [token.token for token in own.trace]
        drawn: dict[str, Any] = {"seed": 3, "temperature": 0.8, "top_k": 20, "stop": ["rage"]}
        here = Mechanex().set_local_model(model.model, model.tokenizer).set_execution_mode("local")
        text = here.sae.generate(PROVOKING[0], N, [], **drawn)
        assert remote.sae.generate(PROVOKING[0], N, [], **drawn) == text
        with pytest.raises(NotFoundError, match="'nope'"):
            remote.sae.generate(PROVOKING[0], N, ["nope"])
        remote.sae.delete_behavior("anger")
        assert remote.sae.list_behaviors() == []


def streamed(url: str, body: dict[str, Any]) -> tuple[list[dict[str, Any]], str]:
    """The choices of a stream's events, in order, and the last line of it."""
    with httpx.stream("POST", f"{url}/v1/completions", json=body | {"stream": True}, timeout=120) as answer:
        lines = [line for line in answer.iter_lines() if line]
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    return [choice for event in events for choice in event["choices"]], lines[-1]


def test_a_stream_ends_with_the_token_that_shows_the_behavior_and_others_go_on(
    model: LoadedModel, wanted: dict[str, list[Any]]
) -> None:
    own = wanted["abort"][0]
    assert own.finish_reason == "behavior" and len(own.trace) < N
    prompt = PROVOKING[0]
    body: dict[str, Any] = {"prompt": prompt, "max_tokens": N, "temperature": 0}
    ending = body | {"behavior_names": ["anger"], "behavior_action": "abort", "behavior_scores": True}
    with (
        Mechanex()
        .set_local_model(model.model, model.tokenizer)
        .serve(host="127.0.0.1", port=0, block=False) as running
    ):
        Mechanex(running.url, "any").set_execution_mode("remote").sae.create_behavior(
            "anger", *(ANGER[name] for name in ANGER)
        )
        plain = httpx.post(f"{running.url}/v1/completions", json=body, timeout=120).json()["choices"][0]
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda one: streamed(running.url, one), [ending, body, ending, body]))
    for choices, last in found[::2]:
        assert prompt + "".join(choice["text"] for choice in choices) == own.text
        reasons = [c["finish_reason"] for c in choices if c["finish_reason"] is not None]
        assert reasons == ["behavior"] and last == "data: [DONE]"
        tokens = [token for c in choices for token in c.get("behaviors", {"tokens": []})["tokens"]]
        assert len(tokens) == len(own.trace)
        detected = [bool(token["detected"]) for token in tokens]
        assert any(detected) and detected == [bool(token.detected) for token in own.trace]
    for choices, last in found[1::2]:
        assert "".join(choice["text"] for choice in choices) == plain["text"] and last == "data: [DONE]"


def test_a_vector_of_ones_own_corrects(server: Server) -> None:
    client = server.start()
    vector = client.post("/steering/generate", json=ANGER | {"method": "caa", "layer_idxs": [4]}).json()
    made = client.post("/behaviors/create", json=CREATE | vector).json()
    assert made["steering_vector_id"] == vector["steering_vector_id"] and made["detector"]
    assert watched(client, PROVOKING[0], behavior_names=["anger"])["detected"] == ["anger"]
    other = client.post("/steering/generate", json=ANGER | {"method": "caa", "layer_idxs": [1]}).json()
    answer = client.post("/behaviors/create", json=CREATE | other | {"behavior_name": "b"})
    assert answer.status_code == 400 and "make one with layer_idxs=[4]" in answer.json()["detail"]
    assert [one["behavior_name"] for one in client.get("/behaviors").json()] == ["anger"]
