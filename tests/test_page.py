"""The playground without a browser: its files and their policy, and what it alone asks of the server."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from argon2 import PasswordHasher
from fastapi.testclient import TestClient

from mechanex.engine.chat import Chat
from mechanex.engine.doses.forced import ForcedAnswers
from mechanex.engine.models import adapter_for
from mechanex.engine.models.resolve import LoadedModel, load
from mechanex.engine.prompt_conditions import PromptCondition
from mechanex.engine.text import encode_pair
from mechanex.engine.vector_store import VectorStore
from mechanex.engine.vectors import SteeringVector
from mechanex.server.accounts.passwords import Passwords
from mechanex.server.app import create_app
from mechanex.server.settings import ServerSettings

STATIC = Path(__file__).parents[1] / "mechanex" / "server" / "page" / "static"
FILES = ["/", *sorted(f"/page/{path.name}" for path in STATIC.iterdir() if path.name != "index.html")]
KINDS = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
KEY = "the-operators-key"
EXAMPLES: dict[str, Any] = {
    "prompts": ["The man said", "The woman said"],
    "positive_answers": [" he was happy", " she was glad"],
    "negative_answers": [" he was angry", " she was sad"],
}
LONG = {name: [" word" * 200] * 32 for name in EXAMPLES}
PROMPT = "Anna went to the market on Friday."

Connect = Callable[..., TestClient]


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return load("mx-tiny", backend="transformers")


@pytest.fixture(scope="module")
def connect(model: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Connect]:
    cheap = PasswordHasher(time_cost=1, memory_cost=8, parallelism=1)
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        patch.setenv("MECHANEX_HOME", str(tmp_path_factory.mktemp("home")))
        patch.setattr("mechanex.server.accounts.store.Passwords", lambda: Passwords(cheap))

        def start(host: str = "127.0.0.1", **settings: Any) -> TestClient:
            app = create_app(ServerSettings(host=host, **settings), model)
            return stack.enter_context(TestClient(app, "http://localhost", raise_server_exceptions=False))

        yield start


@pytest.fixture(scope="module")
def vector(model: LoadedModel) -> SteeringVector:
    generator = torch.Generator().manual_seed(3)
    return SteeringVector(
        {2: torch.randn(128, generator=generator), 4: torch.randn(128, generator=generator)}
    )


@pytest.fixture(scope="module")
def client(connect: Connect, vector: SteeringVector, tmp_path_factory: pytest.TempPathFactory) -> TestClient:
    folder = tmp_path_factory.mktemp("vectors")
    vector.save(folder / "noise.safetensors")
    SteeringVector({2: torch.full((128,), 3e38), 4: torch.full((128,), 3e38)}).save(
        folder / "huge.safetensors"
    )
    vector.when(PromptCondition(2, vector[2], 0.5)).save(folder / "conditional.safetensors")
    return connect(vectors=folder, behaviors=(Path("calm_angry"),))


@pytest.fixture(scope="module")
def locked(connect: Connect) -> TestClient:
    return connect("0.0.0.0", key=KEY, open_signup=True)


def account(client: TestClient, email: str) -> dict[str, str]:
    answer = client.post("/auth/signup", json={"email": email, "password": "correct horse"})
    assert answer.status_code == 200, answer.text
    answer = client.post("/auth/login", json={"email": email, "password": "correct horse"})
    return {"authorization": f"Bearer {answer.json()['session']['access_token']}"}


# The files


@pytest.mark.parametrize("path", FILES)
def test_every_file_is_served_without_a_key_and_may_run_nothing_else(locked: TestClient, path: str) -> None:
    answer = locked.get(path)
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith(KINDS.get(Path(path).suffix, "text/html"))
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["form-action"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"


@pytest.mark.parametrize("path", FILES)
def test_a_file_that_the_browser_has_is_not_sent_again(locked: TestClient, path: str) -> None:
    first, head = locked.get(path), locked.head(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == str(len(first.content))
    again = locked.get(path, headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize(
    "path",
    [
        "/page",
        "/page/",
        "/page/index.html",
        "/page/../settings.py",
        "/page/%2e%2e/settings.py",
        "/page/..%2fsettings.py",
        "/page/app.js/",
        "/page//app.js",
        "/page/app.js%00.html",
        "//page/app.js",
        "/page/files.py",
    ],
)
def test_no_other_path_leads_to_a_file(client: TestClient, locked: TestClient, path: str) -> None:
    assert client.get(path).status_code == 404
    assert locked.get(path).status_code == 401


def test_the_page_takes_nothing_but_what_it_ships(client: TestClient) -> None:
    """No other host, no inline script or style, and every file that one names is there."""
    for path in FILES:
        text = client.get(path).text
        assert not re.findall(r"(?:src|href|from|import|url)\s*[=(]?\s*[\"'(]+\s*(?:https?:)?//", text), path
        names = re.findall(r"(?:src|href)=\"([^\"#]+)\"", text) if path == "/" else []
        names += [
            "/page/" + name.removeprefix("./")
            for name in re.findall(r"^(?:import|export)\b[^;]*?from \"([^\"]+)\"", text, re.M)
        ]
        assert set(names) <= set(FILES), path
    page = client.get("/").text
    assert not re.search(r"\son\w+=|\sstyle=|<style|javascript:", page)
    assert all("src=" in tag for tag in re.findall(r"<script[^>]*>", page))


def test_a_page_of_the_web_under_another_name_gets_nothing(client: TestClient) -> None:
    assert client.get("/", headers={"host": "evil.example"}).status_code == 403


def test_what_the_page_asks_needs_a_key_where_the_server_does(locked: TestClient) -> None:
    for method, path in [
        ("GET", "/page/about"),
        ("GET", "/page/vectors/x"),
        ("POST", "/page/compare"),
        ("POST", "/page/sweep"),
    ]:
        assert locked.request(method, path).status_code == 401
    assert locked.get("/page/about", headers={"authorization": f"Bearer {KEY}"}).status_code == 200


def test_the_files_are_read_when_they_are_asked_for() -> None:
    reads = (
        "import sys; seen = []; "
        "sys.addaudithook(lambda event, args: seen.append(str(args[0])) if event == 'open' else None); "
        "import mechanex.server.page.files; print([path for path in seen if 'page/static' in path])"
    )
    done = subprocess.run([sys.executable, "-c", reads], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# What it asks


def test_it_is_told_the_model_and_everything_that_steers_it(client: TestClient, model: LoadedModel) -> None:
    made = client.post("/steering/generate", json={**EXAMPLES, "layer_idxs": [1, 3]}).json()[
        "steering_vector_id"
    ]
    about = client.get("/page/about").json()
    assert (about["model"], about["layers"], about["chat"]) == ("mx-tiny", 6, True)
    found = {one["id"]: one for one in about["vectors"]}
    assert (found["noise"]["owner"], found["noise"]["layers"]) == ("server", [2, 4])
    assert found["calm_angry"]["names"] == ["calm_angry"]
    assert (found[made]["owner"], found[made]["layers"], found[made]["method"]) == (
        "account",
        [1, 3],
        "few-shot",
    )
    assert all(norm > 0 for norm in found[made]["norms"])


def test_a_name_of_the_servers_behaviors_steers_like_a_vector(client: TestClient) -> None:
    body = {"model": "mx-tiny", "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    named = {**body, "behavior_names": ["calm_angry"], "steering_strength": 2}
    listed = {**body, "steering": [{"vector": "calm_angry", "strength": 2}]}
    texts = [
        client.post("/v1/completions", json=one).json()["choices"][0]["text"] for one in (named, listed, body)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_accounts_see_and_download_only_what_is_theirs(locked: TestClient) -> None:
    ann, bob = account(locked, "ann@example.org"), account(locked, "bob@example.org")
    made = locked.post("/steering/generate", json=EXAMPLES, headers=ann).json()["steering_vector_id"]
    ids = [
        [one["id"] for one in locked.get("/page/about", headers=who).json()["vectors"]] for who in (ann, bob)
    ]
    assert (made in ids[0], made in ids[1]) == (True, False)
    assert locked.get(f"/page/vectors/{made}", headers=ann).status_code == 200
    assert locked.get(f"/page/vectors/{made}", headers=bob).status_code == 404


def test_a_key_for_texts_alone_is_told_what_every_sender_may_use(client: TestClient) -> None:
    ann = account(client, "texts@example.org")
    made = client.post("/steering/generate", json=EXAMPLES, headers=ann).json()["steering_vector_id"]
    told: dict[str, set[str]] = {}
    for scope in ("generate", "vectors", "admin"):
        key = client.post("/auth/api-keys", json={"scopes": [scope]}, headers=ann).json()["key"]
        about = client.get("/page/about", headers={"x-api-key": key}).json()
        assert about["model"] == "mx-tiny"
        told[scope] = {one["id"] for one in about["vectors"]}
    assert told["generate"] == told["admin"] == told["vectors"] - {made} != told["vectors"]
    assert {"noise", "calm_angry"} <= told["generate"]
    beside = client.get("/page/about", headers={"x-api-key": key, **ann}).json()
    assert {one["id"] for one in beside["vectors"]} == told["vectors"]


def test_what_is_stored_on_the_machine_is_the_operators(
    client: TestClient, locked: TestClient, vector: SteeringVector
) -> None:
    stored = [VectorStore().put(vector), VectorStore().put(2 * vector)]
    found = [one for one in client.get("/page/about").json()["vectors"] if one["owner"] == "operator"]
    assert sorted(one["id"] for one in found) == sorted(stored)
    eve = account(locked, "eve@example.org")
    assert not [
        one for one in locked.get("/page/about", headers=eve).json()["vectors"] if one["id"] in stored
    ]
    assert locked.get(f"/page/vectors/{stored[0]}", headers=eve).status_code == 404
    assert client.get(f"/page/vectors/{stored[0]}").status_code == 200


def test_a_downloaded_vector_is_the_one_that_steers(
    client: TestClient, vector: SteeringVector, tmp_path: Path
) -> None:
    answer = client.get("/page/vectors/noise")
    assert answer.headers["content-disposition"] == 'attachment; filename="noise.safetensors"'
    path = tmp_path / "noise.safetensors"
    path.write_bytes(answer.content)
    assert SteeringVector.load(path) == vector
    assert client.get("/page/vectors/nothing").status_code == 404
    assert client.get("/page/vectors/..%2f..%2fserver.sqlite").status_code == 404


@pytest.mark.parametrize("chat", [False, True])
def test_tokens_are_compared_exactly(
    client: TestClient, model: LoadedModel, vector: SteeringVector, chat: bool
) -> None:
    messages = [{"role": "user", "content": PROMPT}]
    asked: dict[str, Any] = {"messages": messages} if chat else {"prompt": PROMPT}
    answers = [" She bought bread.", " He was angry and sad."]
    steering = [{"vector": "noise", "strength": 1.5, "layers": [4]}]
    body = {**asked, "answers": answers, "steering": steering, "top": 3}
    found = client.post("/page/compare", json=body).json()["answers"]

    adapter = adapter_for(model.model)
    prompt: Any = Chat(messages) if chat else PROMPT
    pairs = [encode_pair(model.tokenizer, prompt, answer) for answer in answers]
    forced = ForcedAnswers(adapter, pairs)
    steered = forced.under([vector.restricted([4]).plan(adapter, 1.5).interventions])[0]
    flat = [token for answer in found for token in answer]
    assert ["".join(token["token"] for token in answer) for answer in found] == answers
    torch.testing.assert_close(
        torch.tensor([t["kl"] for t in flat]), steered.kl.float(), atol=2e-4, rtol=1e-3
    )
    logprobs = torch.tensor([t["logprobs"] for t in flat])
    torch.testing.assert_close(logprobs[:, 0], forced.plain.float(), atol=2e-4, rtol=1e-3)
    torch.testing.assert_close(logprobs[:, 1], steered.logprobs.float(), atol=2e-4, rtol=1e-3)
    for token in flat:
        for side in ("plain", "steered"):
            values = [logprob for _, logprob in token[side]]
            assert values == sorted(values, reverse=True) and len(values) == 3


def test_a_character_of_several_tokens_comes_whole(client: TestClient) -> None:
    answer = " Thé 🎉 was nice."
    body = {"prompt": PROMPT, "answers": [answer]}
    (tokens,) = client.post("/page/compare", json=body).json()["answers"]
    assert "".join(token["text"] for token in tokens) == answer
    assert any(token["text"] == "" for token in tokens)


def test_what_does_not_steer_moves_nothing(client: TestClient) -> None:
    body = {
        "prompt": PROMPT,
        "answers": [" She bought bread.", ""],
        "steering": [{"vector": "noise", "strength": 0}],
    }
    tokens, nothing = client.post("/page/compare", json=body).json()["answers"]
    assert [token["kl"] for token in tokens] == [0] * len(tokens) and tokens
    assert nothing == []


def test_a_sweep_tells_effect_and_price_by_strength_and_layer(
    client: TestClient, vector: SteeringVector
) -> None:
    body = {"prompt": PROMPT, "answer": " She bought bread.", "strengths": [-2, 0, 2], "examples": EXAMPLES}
    lines = client.post("/page/sweep", json={**body, "vector": "noise", "by_layer": True}).json()["lines"]
    assert [line["layer"] for line in lines] == [None, 2, 4]
    for line in lines:
        assert [point["strength"] for point in line["points"]] == [-2, 0, 2]
        assert line["points"][1]["kl"] == 0 and line["points"][1]["effect"] == pytest.approx(0, abs=1e-4)
        assert line["points"][0]["kl"] > 0.001 and line["points"][2]["kl"] > 0.001
    bare = {key: value for key, value in body.items() if key != "examples"}
    lines = client.post("/page/sweep", json={**bare, "vector": "noise"}).json()["lines"]
    assert [point["effect"] for point in lines[0]["points"]] == [None] * 3


def test_a_vector_made_of_the_examples_has_its_effect_in_a_sweep(client: TestClient) -> None:
    made = client.post("/steering/generate", json=EXAMPLES).json()["steering_vector_id"]
    body = {"prompt": PROMPT, "answer": " She bought bread.", "strengths": [-1, 1], "examples": EXAMPLES}
    (line,) = client.post("/page/sweep", json={**body, "vector": made}).json()["lines"]
    assert line["points"][0]["effect"] < 0 < line["points"][1]["effect"]


@pytest.mark.parametrize(
    ("path", "change", "said"),
    [
        ("compare", {"steering": [{"vector": "gone"}]}, "no steering vector has the id 'gone'"),
        ("compare", {"steering": [{"vector": "huge"}]}, "steer less"),
        ("compare", {"steering": [{"vector": "conditional"}]}, "leave the condition out"),
        ("compare", {"answers": [" word" * 3000]}, "shorten"),
        ("sweep", {"vector": "huge"}, "steer less"),
        ("sweep", {"vector": "conditional"}, "without the condition"),
        ("sweep", {"strengths": [1] * 13, "by_layer": True, "examples": LONG}, "262144 at most"),
    ],
)
def test_what_cant_be_told_is_refused_with_a_reason(
    client: TestClient, path: str, change: dict[str, Any], said: str
) -> None:
    bodies: dict[str, dict[str, Any]] = {
        "compare": {"prompt": PROMPT, "answers": [" She bought bread."]},
        "sweep": {"prompt": PROMPT, "answer": " She bought bread.", "vector": "noise", "strengths": [1]},
    }
    answer = client.post(f"/page/{path}", json={**bodies[path], **change})
    assert answer.status_code in (400, 404) and said in answer.json()["detail"], answer.text


@pytest.mark.parametrize(
    "change", [{"prompt": None}, {"messages": [{"role": "user", "content": "x"}]}, {"top": 21}]
)
def test_a_body_out_of_bounds_is_refused(client: TestClient, change: dict[str, Any]) -> None:
    body = {"prompt": PROMPT, "answers": [" She bought bread."], **change}
    assert client.post("/page/compare", json=body).status_code == 422
