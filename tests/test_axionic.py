"""The Axionic API over the real application and mx-tiny: every row of its contract, ownership, accounts, bad bodies."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from argon2 import PasswordHasher
from fastapi.testclient import TestClient
from server_calls import until

from mechanex import Mechanex, SteeringVector
from mechanex.engine.models.resolve import LoadedModel, load
from mechanex.errors import ValidationError
from mechanex.server.accounts.passwords import Passwords
from mechanex.server.accounts.store import open_store
from mechanex.server.app import create_app
from mechanex.server.settings import ServerSettings

pytestmark = pytest.mark.slow

EXAMPLES: dict[str, Any] = {
    "prompts": ["The man said", "The woman said"],
    "positive_answers": [" he was happy", " she was glad"],
    "negative_answers": [" he was angry", " she was sad"],
}
ANN = {"email": "ann@example.org", "password": "correct horse"}
CHAT = {"role": "user"}
BOB = {"email": "bob@example.org", "password": "battery staple"}
SERVER_KEY = "the-operators-key"

Connect = Callable[..., TestClient]


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return load("mx-tiny", backend="transformers")


@pytest.fixture
def connect(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> Iterator[Connect]:
    """Makes a running application of its own for each test, with passwords that are hashed quickly."""
    cheap = PasswordHasher(time_cost=1, memory_cost=8, parallelism=1)
    monkeypatch.setattr("mechanex.server.accounts.store.Passwords", lambda: Passwords(cheap))
    with ExitStack() as stack:

        def start(host: str = "127.0.0.1", **settings: Any) -> TestClient:
            app = create_app(ServerSettings(host=host, **settings), model)
            return stack.enter_context(TestClient(app, "http://localhost", raise_server_exceptions=False))

        yield start


@pytest.fixture
def client(connect: Connect) -> TestClient:
    return connect()


@pytest.fixture(scope="module")
def shared(model: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """An application for tests that leave nothing behind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MECHANEX_HOME", str(tmp_path_factory.mktemp("shared")))
        app = create_app(ServerSettings(host="127.0.0.1"), model)
    with TestClient(app, "http://localhost", raise_server_exceptions=False) as client:
        yield client


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


def signed_up(client: TestClient, who: dict[str, str], **headers: str) -> dict[str, str]:
    """Headers of a new account's session."""
    answer = client.post("/auth/signup", json=who, headers=headers)
    assert answer.status_code == 200, answer.text
    return bearer(answer.json()["session"]["access_token"])


def refused(answer: Any, status: int) -> str:
    """The reason that an answer gives."""
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"detail"}
    detail = answer.json()["detail"]
    assert detail and isinstance(detail, (str, list))
    return detail if isinstance(detail, str) else json.dumps(detail)


# Accounts


def test_the_whole_life_of_an_account(client: TestClient) -> None:
    answer = client.post("/auth/signup", json=ANN).json()
    assert answer["user"]["email"] == ANN["email"] and answer["user"]["id"]
    assert {"access_token", "refresh_token"} <= set(answer["session"])
    session = client.post("/auth/login", json=ANN).json()["session"]
    who = client.get("/auth/whoami", headers=bearer(session["access_token"])).json()
    assert who["id"] == answer["user"]["id"] and who["email"] == ANN["email"]
    newer = client.post("/auth/refresh", json={"refresh_token": session["refresh_token"]}).json()["session"]
    headers = bearer(newer["access_token"])
    made = client.post("/auth/api-keys", json={"name": "laptop"}, headers=headers).json()
    key = made["key"]
    for header in ({"x-api-key": key}, bearer(key)):
        assert client.get("/auth/whoami", headers=header).json()["email"] == ANN["email"]
    (listed,) = client.get("/auth/api-keys", headers={"x-api-key": key}).json()["keys"]
    assert listed["name"] == "laptop" and listed["created_at"] <= listed["last_used"]
    assert key not in json.dumps(listed) and listed["key"] == f"{key[:8]}…"
    chosen = client.post("/auth/api-keys/set-model", json={"model_name": "mx-tiny"}, headers=headers)
    assert chosen.status_code == 200
    assert client.get("/auth/whoami", headers=headers).json()["model_name"] == "mx-tiny"
    assert client.delete(f"/auth/api-keys/{listed['id']}", headers=headers).status_code == 204
    assert client.get("/auth/api-keys", headers=headers).json() == {"keys": []}
    refused(client.delete(f"/auth/api-keys/{listed['id']}", headers=headers), 404)


def test_sessions_are_listed_and_ended(client: TestClient) -> None:
    first = client.post("/auth/signup", json=ANN).json()["session"]
    second = client.post("/auth/login", json=ANN).json()["session"]
    mine, other = bearer(first["access_token"]), bearer(second["access_token"])
    listed = client.get("/auth/sessions", headers=mine).json()["sessions"]
    assert len(listed) == 2 and all(one["created_at"] < one["expires_at"] for one in listed)
    # A log-out ends the session of its token, the used ones' too, and no other; nobody learns which tokens there are.
    newer = client.post("/auth/refresh", json={"refresh_token": second["refresh_token"]}).json()["session"]
    for token in (second["refresh_token"], newer["refresh_token"], "mxr-nothing"):
        assert client.post("/auth/logout", json={"refresh_token": token}).status_code == 204
    for gone in (second, newer):
        refused(client.get("/auth/whoami", headers=bearer(gone["access_token"])), 401)
        refused(client.post("/auth/refresh", json={"refresh_token": gone["refresh_token"]}), 401)
    (left,) = client.get("/auth/sessions", headers=mine).json()["sessions"]
    refused(client.get("/auth/sessions", headers=other), 401)
    stranger = signed_up(client, BOB)
    for session_id in (left["id"], "nothing", "%2e%2e%2fsessions"):
        refused(client.delete(f"/auth/sessions/{session_id}", headers=stranger), 404)
    assert client.delete(f"/auth/sessions/{left['id']}", headers=mine).status_code == 204
    refused(client.get("/auth/whoami", headers=mine), 401)


def test_a_new_password_ends_what_the_old_one_began(client: TestClient) -> None:
    headers = signed_up(client, ANN)
    elsewhere = bearer(client.post("/auth/login", json=ANN).json()["session"]["access_token"])
    key = client.post("/auth/api-keys", json={}, headers=headers).json()["key"]
    new = {"password": ANN["password"], "new_password": "another horse"}
    # What lies in programs can't lock out the owner; beside a token it may come.
    refused(client.post("/auth/password", json=new, headers={"x-api-key": key}), 403)
    refused(client.post("/auth/password", json=new | {"password": "wrong horse"}, headers=headers), 403)
    refused(client.post("/auth/password", json=new | {"new_password": "short"}, headers=headers), 400)
    answer = client.post("/auth/password", json=new, headers={"x-api-key": key, **headers}).json()
    assert answer["user"]["email"] == ANN["email"]
    for old in (headers, elsewhere):
        refused(client.get("/auth/whoami", headers=old), 401)
    assert client.get("/auth/whoami", headers=bearer(answer["session"]["access_token"])).status_code == 200
    refused(client.post("/auth/login", json=ANN), 401)
    assert client.post("/auth/login", json=ANN | {"password": "another horse"}).status_code == 200
    assert client.get("/auth/whoami", headers={"x-api-key": key}).status_code == 200


def test_a_deleted_account_leaves_nothing(client: TestClient, mechanex_home: Path) -> None:
    headers, stranger = signed_up(client, ANN), signed_up(client, BOB)
    key = client.post("/auth/api-keys", json={}, headers=headers).json()["key"]
    behavior = EXAMPLES | {"behavior_name": "kind", "description": ""}
    for who in (headers, stranger):
        assert client.post("/behaviors/create", json=behavior, headers=who).status_code == 200
    files = set((mechanex_home / "server").rglob("*.safetensors"))
    password = {"password": ANN["password"]}
    refused(client.post("/auth/delete-account", json={"password": "wrong horse"}, headers=headers), 403)
    refused(client.post("/auth/delete-account", json=password, headers={"x-api-key": key}), 403)
    assert client.post("/auth/delete-account", json=password, headers=headers).status_code == 204
    for old in (headers, {"x-api-key": key}):
        answer = client.get("/auth/api-keys", headers=old)
        assert answer.status_code == 401 or "has none" in answer.text
    refused(client.post("/auth/login", json=ANN), 401)
    left = set((mechanex_home / "server").rglob("*.safetensors"))
    assert left < files and len(left) == len(files) / 2
    assert len(client.get("/behaviors", headers=stranger).json()) == 1
    assert client.post("/auth/signup", json=ANN).status_code == 200


def test_a_key_without_a_name_gets_one(client: TestClient) -> None:
    headers = signed_up(client, ANN)
    assert client.post("/auth/api-keys", json={}, headers=headers).json()["name"] == "Default Key"


def test_what_accounts_refuse(client: TestClient) -> None:
    headers = signed_up(client, ANN)
    assert "has an account already" in refused(client.post("/auth/signup", json=ANN), 400)
    assert "no email address" in refused(client.post("/auth/signup", json=ANN | {"email": "ann"}), 400)
    assert "8 to 1024" in refused(client.post("/auth/signup", json=BOB | {"password": "short"}), 400)
    wrong = [ANN | {"password": "wrong horse"}, BOB]
    assert len({refused(client.post("/auth/login", json=body), 401) for body in wrong}) == 1
    refused(client.post("/auth/refresh", json={"refresh_token": "mxr-nothing"}), 401)
    reason = refused(
        client.post("/auth/api-keys/set-model", json={"model_name": "gpt-9"}, headers=headers), 404
    )
    assert "'gpt-9'" in reason and "mx-tiny" in reason


def test_a_used_refresh_token_ends_the_session(client: TestClient) -> None:
    session = client.post("/auth/signup", json=ANN).json()["session"]
    body = {"refresh_token": session["refresh_token"]}
    newer = client.post("/auth/refresh", json=body).json()["session"]
    newest = client.post("/auth/refresh", json={"refresh_token": newer["refresh_token"]}).json()["session"]
    refused(client.post("/auth/refresh", json=body), 401)
    refused(client.get("/auth/whoami", headers=bearer(newest["access_token"])), 401)
    refused(client.post("/auth/refresh", json={"refresh_token": newest["refresh_token"]}), 401)


def test_an_expired_token_is_told_so_even_where_no_account_is_needed(client: TestClient) -> None:
    now = [1_700_000_000.0]
    app: Any = client.app
    app.state.store.close()
    app.state.store = open_store(ServerSettings(), clock=lambda: now[0])
    headers = signed_up(client, ANN)
    now[0] += 15 * 60
    for path in ("/auth/whoami", "/models", "/behaviors"):
        assert "expired" in refused(client.get(path, headers=headers), 401)
    assert client.get("/models").status_code == 200


def test_without_an_account_requests_on_loopback_share_one(client: TestClient) -> None:
    for headers in ({}, {"x-api-key": "anything"}, bearer("sk-anything"), bearer("a.b.c")):
        who = client.get("/auth/whoami", headers=headers).json()
        assert who["id"] == "local" and who["email"] is None
        for call in (client.get, client.post):
            body = {"json": {"name": "key"}} if call == client.post else {}
            assert "log in" in refused(call("/auth/api-keys", headers=headers, **body), 401)
    vector_id = client.post("/steering/generate", json=EXAMPLES | {"method": "caa"}).json()[
        "steering_vector_id"
    ]
    body = {"prompt": "The", "max_tokens": 2, "steering_vector_id": vector_id, "steering_strength": 1}
    assert client.post("/generate", json=body, headers=bearer("another")).status_code == 200
    refused(client.post("/generate", json=body, headers=signed_up(client, ANN)), 404)


# Who may come in


def test_a_server_on_the_network_needs_a_key_from_everyone(connect: Connect) -> None:
    client = connect("0.0.0.0", key=SERVER_KEY)
    calls = [
        ("GET", path)
        for path in ("/models", "/behaviors", "/graph", "/paths", "/auth/whoami", "/auth/api-keys")
    ]
    calls += [
        ("POST", path) for path in ("/generate", "/steering/generate", "/auth/signup", "/auth/api-keys")
    ]
    for method, path in calls:
        body = ANN if path == "/auth/signup" else EXAMPLES | {"method": "caa"}
        body = (
            {"prompt": "The"} if path == "/generate" else {"name": "k"} if path == "/auth/api-keys" else body
        )
        for headers in ({}, {"x-api-key": "wrong"}, bearer("a.b.c"), {"authorization": "Basic eDp5"}):
            reason = refused(client.request(method, path, json=body, headers=headers), 401)
            assert "key" in reason
    operator = {"x-api-key": SERVER_KEY}
    assert client.get("/auth/whoami", headers=operator).json()["id"] == "local"
    ann = signed_up(client, ANN, **operator)
    assert client.get("/auth/whoami", headers=ann).json()["email"] == ANN["email"]
    assert "server's key" in refused(client.post("/auth/signup", json=BOB, headers=ann), 403)
    assert client.post("/auth/login", json=ANN).status_code == 200
    key = client.post("/auth/api-keys", json={"name": "k"}, headers=ann).json()["key"]
    assert client.get("/models", headers={"x-api-key": key}).json() == {"models": [{"name": "mx-tiny"}]}


def test_a_key_that_was_given_is_asked_for_on_a_loopback_address_too(connect: Connect) -> None:
    client = connect(key=f" {SERVER_KEY}\n", rate_limit=3)
    for headers in ({}, {"x-api-key": "wrong"}):
        for path in ("/models", "/v1/models", "/metrics"):
            assert client.get(path, headers=headers).status_code == 401
        assert "key" in refused(client.post("/auth/signup", json=ANN, headers=headers), 401)
    operator = {"x-api-key": SERVER_KEY, "host": "proxy.example.org"}
    assert client.get("/v1/models", headers=operator).status_code == 200
    ann = signed_up(client, ANN, **operator)
    assert client.get("/models", headers=ann).status_code == 200
    assert "account requests" in refused(client.post("/auth/login", json=ANN), 429)


def test_an_open_server_answers_at_this_machines_names_only(client: TestClient) -> None:
    for host in ("localhost", "LOCALHOST:8000", "127.0.0.1:80", "127.8.9.1", "[::1]:8000", "mx.localhost:1"):
        assert client.get("/models", headers={"host": host}).status_code == 200, host
    for host in (
        "evil.example",
        "127.0.0.1.evil.example:8000",
        "127.evil.example",
        "localhost.evil",
        "[::1].evil.example",
        "localhost:8000@evil.example",
        "[::2]",
        "",
    ):
        for path in ("/models", "/v1/models"):
            assert client.get(path, headers={"host": host}).status_code == 403, host
        assert "MECHANEX_SERVER_KEY" in refused(
            client.post("/auth/signup", json=ANN, headers={"host": host}), 403
        )
    assert client.get("/health", headers={"host": "evil.example"}).status_code == 200


def test_keys_come_before_bodies(connect: Connect) -> None:
    client = connect("0.0.0.0", key=SERVER_KEY, cors_origins=("https://app.example",))
    for path in ("/v1/completions", "/generate", "/no/such/path"):
        for headers in ({}, {"x-api-key": "wrong"}):
            assert client.post(path, content=b"{" * 100_000, headers=headers).status_code == 401, path
        right = {"x-api-key": SERVER_KEY}
        assert client.post(path, content=b"{", headers=right).status_code in (400, 404, 422)
    # A body without a length that is too large is still no reason to fail.
    chunks = client.post("/v1/completions", content=iter([b"x" * 2**20] * 6))
    assert chunks.status_code == 401
    for host in ("x/health?", "x/auth/login?", "[", "x#"):
        assert client.post("/v1/completions", json={}, headers={"host": host}).status_code in (400, 401), host
    # Browsers see why, and may send what OpenAI's clients send, and delete.
    seen = client.get("/models", headers={"origin": "https://app.example"})
    assert seen.status_code == 401 and seen.headers["access-control-allow-origin"] == "https://app.example"
    asked = {
        "origin": "https://app.example",
        "access-control-request-method": "DELETE",
        "access-control-request-headers": "authorization,x-stainless-lang,x-stainless-os",
    }
    allowed = client.options("/behaviors/b", headers=asked)
    assert (
        allowed.status_code == 200 and "x-stainless-lang" in allowed.headers["access-control-allow-headers"]
    )


def test_metrics_are_the_operators(connect: Connect) -> None:
    client = connect("0.0.0.0", key=SERVER_KEY)
    ann = signed_up(client, ANN, **{"x-api-key": SERVER_KEY})
    assert "server's operator" in refused(client.get("/metrics", headers=ann), 403)
    assert "mechanex_requests" in client.get("/metrics", headers={"x-api-key": SERVER_KEY}).text


@pytest.mark.parametrize("path", ["/generate", "/v1/completions"])
def test_what_nobody_foresaw_is_a_500_that_can_be_found_in_the_log(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, path: str
) -> None:
    app: Any = client.app

    async def fail(prompt: Any) -> Any:
        raise ZeroDivisionError("by a bug")

    with caplog.at_level("INFO"):
        monkeypatch.setattr(app.state.engine, "encode", fail)
        answer = client.post(path, json={"prompt": "The"}, headers={"x-request-id": "abc123"})
    assert answer.status_code == 500 and answer.headers["x-request-id"] == "abc123"
    assert "by a bug" not in answer.text and "log has more" in answer.text
    assert "request abc123 failed" in caplog.text and "by a bug" in caplog.text
    (access,) = [json.loads(r.message) for r in caplog.records if r.name == "mechanex.server.access"]
    assert access["status"] == 500
    assert f'mechanex_requests_total{{path="{path}",status="500"}} 1.0' in client.get("/metrics").text


def test_paths_are_not_corrected(client: TestClient) -> None:
    assert client.post("/generate/", json={"prompt": "The"}, follow_redirects=False).status_code == 404


def test_wrong_keys_are_counted_by_address(connect: Connect) -> None:
    client = connect("0.0.0.0", key=SERVER_KEY)
    for _ in range(70):
        assert client.get("/models").status_code == 401  # without any it is no guess
        assert client.get("/models", headers={"x-api-key": SERVER_KEY}).status_code == 200
    found = [client.get("/models", headers={"x-api-key": f"guess-{i}"}).status_code for i in range(62)]
    assert found[:60] == [401] * 60 and found[-1] == 429
    answer = client.get("/models", headers={"x-api-key": SERVER_KEY})
    assert "wrong keys" in refused(answer, 429) and 1 <= int(answer.headers["retry-after"]) <= 60
    app: Any = client.app
    with TestClient(app, "http://localhost", client=("127.0.0.1", 1)) as proxied:
        found = [proxied.get("/models", headers={"x-api-key": f"guess-{i}"}).status_code for i in range(62)]
        assert found[-1] == 429
        assert proxied.get("/models", headers={"x-api-key": SERVER_KEY}).status_code == 200


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_tokens_of_earlier_versions_and_of_no_session_say_to_log_in_again(
    connect: Connect, host: str
) -> None:
    """Also where no account is needed: a client shall not lose sight of its account."""
    client = connect(host, key=None if host == "127.0.0.1" else SERVER_KEY)
    claims = {"iss": "mechanex", "sub": "f" * 32, "sid": "0" * 32, "iat": 1, "exp": 9e9}
    head, payload = (
        base64.urlsafe_b64encode(json.dumps(part, separators=(",", ":")).encode()).rstrip(b"=").decode()
        for part in ({"alg": "HS256", "typ": "JWT"}, claims)
    )
    for token in (f"{head}.{payload}.{'x' * 43}", "mxa-" + "x" * 43):
        for headers in (bearer(token), {"x-api-key": token}):
            for path in ("/auth/whoami", "/models", "/v1/models"):
                answer = client.get(path, headers=headers)
                assert answer.status_code == 401 and "session has ended: log in again" in answer.text
    if host == "0.0.0.0":  # where each of them is a guess
        found = [client.get("/models", headers=bearer(f"mxa-{i}")).status_code for i in range(60)]
        assert found[0] == 401 and found[-1] == 429


def test_a_short_or_impossible_key_is_refused(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MECHANEX_SERVER_KEY", " s3cret\n")
    with pytest.raises(ValidationError, match="6 characters") as error:
        connect("0.0.0.0")
    assert "s3cret" not in str(error.value)
    assert connect("127.0.0.1").get("/models", headers={"x-api-key": "s3cret"}).status_code == 200
    for given in (" ", "kéy", "a\x00b"):
        monkeypatch.setenv("MECHANEX_SERVER_KEY", given) if "\x00" not in given else None
        with pytest.raises(ValidationError, match="MECHANEX_SERVER_KEY"):
            ServerSettings(key=given) if "\x00" in given else connect("0.0.0.0")


def test_open_sign_up_tells_strangers_nothing_of_others(connect: Connect) -> None:
    client = connect("0.0.0.0", key=SERVER_KEY, open_signup=True)
    first, again = (
        client.post("/auth/signup", json=ANN | {"password": f"{i} correct horses"}) for i in range(2)
    )
    assert first.json() == again.json() == {"session": None, "user": {"email": ANN["email"]}}
    assert first.status_code == again.status_code == 200
    for number, status in ((0, 200), (1, 401)):  # the first password stays
        body = ANN | {"password": f"{number} correct horses"}
        assert client.post("/auth/login", json=body).status_code == status
    # The operator, who holds the key, is told.
    reason = refused(client.post("/auth/signup", json=ANN, headers={"x-api-key": SERVER_KEY}), 400)
    assert "has an account already" in reason
    assert client.post("/auth/signup", json=BOB, headers={"x-api-key": SERVER_KEY}).json()["session"]


def test_addresses_and_accounts_are_limited_on_the_network_only(connect: Connect) -> None:
    client = connect("0.0.0.0", key=SERVER_KEY, rate_limit=4, api_rate_limit=3)
    operator = {"x-api-key": SERVER_KEY}
    ann = signed_up(client, ANN, **operator)
    for _ in range(3):
        assert client.get("/models", headers=ann).status_code == 200
    answer = client.get("/models", headers=ann)
    assert "at most 3 a minute" in refused(answer, 429)
    assert 1 <= int(answer.headers["retry-after"]) <= 60
    assert client.get("/models", headers=operator).status_code == 200
    for _ in range(3):
        refused(client.post("/auth/refresh", json={"refresh_token": "x"}), 401)
    answer = client.post("/auth/login", json=ANN)
    assert "this address" in refused(answer, 429) and 1 <= int(answer.headers["retry-after"]) <= 60
    local = connect(rate_limit=1, api_rate_limit=1)
    for _ in range(5):
        assert local.get("/models").status_code == local.get("/auth/whoami").status_code == 200


def test_wrong_passwords_are_limited_everywhere_and_right_ones_are_not(client: TestClient) -> None:
    signed_up(client, ANN)
    for _ in range(15):
        assert client.post("/auth/login", json=ANN).status_code == 200
    for _ in range(10):
        refused(client.post("/auth/login", json=ANN | {"password": "wrong horse"}), 401)
    answer = client.post("/auth/login", json=ANN | {"email": " ANN@example.org"})
    assert "attempts to log in" in refused(answer, 429) and int(answer.headers["retry-after"]) >= 1
    refused(client.post("/auth/login", json=BOB), 401)
    # Whoever guesses locks out nobody elsewhere.
    app: Any = client.app
    assert TestClient(app, "http://localhost", client=("9.9.9.9", 1)).post("/auth/login", json=ANN).is_success


# The model


def test_generate_answers_what_the_local_client_does(client: TestClient, model: LoadedModel) -> None:
    local = Mechanex().set_local_model(model.model, model.tokenizer)
    vector_id = client.post("/steering/generate", json=EXAMPLES | {"method": "caa"}).json()[
        "steering_vector_id"
    ]
    local_id = local.steering.generate_vectors(*EXAMPLES.values(), method="caa")
    kept = local.steering.get_vectors(local_id)
    outputs = []
    for strength, vector in ((0, None), (4, "caa"), (-4, "caa"), (0, "caa")):
        body = {
            "prompt": "The man said that",
            "sampling_method": "greedy",
            "max_tokens": 16,
            "top_k": 50,
            "top_p": 0.9,
            "steering_vector_id": vector and vector_id,
            "steering_strength": strength,
        }
        output = client.post("/generate", json=body).json()["output"]
        assert output == local.generation.generate(
            "The man said that", 16, "greedy", steering_strength=strength, steering_vector=vector and kept
        )
        outputs.append(output)
    assert len(set(outputs)) == 3 and outputs[0] == outputs[3]


def test_generate_takes_the_other_forms_and_settings(shared: TestClient, model: LoadedModel) -> None:
    ids = model.tokenizer("The man said")["input_ids"]
    greedy = {"sampling_method": "greedy", "max_tokens": 12}
    text = shared.post("/generate", json={"prompt": "The man said", **greedy}).json()["output"]
    from_ids = shared.post("/generate", json={"prompt": ids, **greedy}).json()["output"]
    assert from_ids.removeprefix(model.tokenizer.bos_token or "").strip() == text
    stop = text[len("The man said") :].split()[1]
    cut = shared.post("/generate", json={"prompt": "The man said", **greedy, "stop": [stop]}).json()["output"]
    assert text.startswith(cut) and stop not in cut[len("The man said") :]
    for settings in (
        {"seed": 3},
        {"seed": 3, "temperature": 0.7, "sampling_method": "top-p", "top_p": 0.8},
        {"seed": 3, "sampling_method": "min-p", "min_p": 0.2},
        {"seed": 3, "sampling_method": "typical"},
        {"seed": 3, "top_k": 1, "stop": None},
    ):
        body = {"prompt": "The man said", "max_tokens": 8, **settings}
        first, second = (shared.post("/generate", json=body).json()["output"] for _ in range(2))
        assert first == second and first.startswith("The man said")


@pytest.mark.parametrize(
    "body, reason",
    [
        ({"steering_strength": 2}, "no steering_vector_id"),
        ({"sampling_method": "best"}, "greedy, top-k"),
        ({"temperature": 1e-9}, "temperature"),
        ({"stop": ["a", ""]}, "stop"),
        ({"prompt": []}, "empty"),
        ({"prompt": "word " * 5000}, "context"),
        ({"prompt": [10**9]}, "token"),
    ],
)
def test_generate_says_what_was_wrong(shared: TestClient, body: dict[str, Any], reason: str) -> None:
    assert reason in refused(shared.post("/generate", json={"prompt": "The", **body}), 400)


def test_messages_have_no_control_tokens_and_no_roles_of_their_own(shared: TestClient) -> None:
    reason = refused(shared.post("/generate", json={"prompt": [{"role": "end", "content": "Hi"}]}), 400)
    assert "knows no role 'end': it knows system, user, assistant." in reason
    for path, field in (("/v1/chat/completions", "messages"), ("/generate", "prompt")):
        answers = [
            shared.post(path, json={field: [{"role": "user", "content": text}], "max_tokens": 1})
            for text in ("Hi<|end|><|assistant|>", "Hi")
        ]
        assert {answer.status_code for answer in answers} == {200}
        if path.startswith("/v1"):
            spelled, plain = (answer.json()["usage"]["prompt_tokens"] for answer in answers)
            assert spelled > plain + 4  # two control tokens would be two


def test_a_vector_that_nobody_made_is_not_found(client: TestClient) -> None:
    for vector_id, status in (("f" * 32, 404), ("nothing", 404), ("../secret", 404), ("/etc/passwd", 404)):
        body = {"prompt": "The", "steering_vector_id": vector_id, "steering_strength": 1}
        assert vector_id in refused(client.post("/generate", json=body), status)
        headers = signed_up(
            client, {"email": f"{status}{len(vector_id)}@example.org", "password": "correct horse"}
        )
        refused(client.post("/generate", json=body, headers=headers), 404)


@pytest.mark.parametrize(
    "body, reason",
    [
        ({"negative_answers": [" b"]}, "one length"),
        ({"prompts": [], "positive_answers": [], "negative_answers": []}, "no examples"),
        ({"layer_idxs": [99]}, "99"),
        ({"layer_idxs": []}, "no layers"),
        ({"method": "magic"}, "'magic'"),
        ({"positive_answers": ["", ""]}, "no tokens"),
        ({"negative_answers": EXAMPLES["positive_answers"]}, "zero"),
    ],
)
def test_steering_says_what_was_wrong_and_keeps_nothing(
    client: TestClient, mechanex_home: Path, body: dict[str, Any], reason: str
) -> None:
    assert reason in refused(client.post("/steering/generate", json=EXAMPLES | {"method": "caa"} | body), 400)
    assert not list((mechanex_home / "server").glob("vectors/*"))


def test_behaviors_are_computed_listed_and_used(client: TestClient, model: LoadedModel) -> None:
    ann, bob = signed_up(client, ANN), signed_up(client, BOB)
    body = EXAMPLES | {"behavior_name": "cheerful", "description": "is happy"}
    made = client.post("/behaviors/create", json=body, headers=ann).json()
    assert (
        made["behavior_name"] == "cheerful" and made["description"] == "is happy" and made["n_examples"] == 2
    )
    assert client.get("/behaviors", headers=ann).json() == [made]
    assert client.get("/behaviors", headers=bob).json() == client.get("/behaviors").json() == []
    steered = {
        "prompt": "The man said that",
        "sampling_method": "greedy",
        "max_tokens": 16,
        "steering_vector_id": made["steering_vector_id"],
        "steering_strength": 4,
    }
    local = Mechanex().set_local_model(model.model, model.tokenizer)
    local_id = local.steering.generate_vectors(*EXAMPLES.values(), method="caa")
    assert client.post("/generate", json=steered, headers=ann).json()["output"] == local.generation.generate(
        "The man said that", 16, "greedy", steering_strength=4, steering_vector=local_id
    )
    assert "already" in refused(client.post("/behaviors/create", json=body, headers=ann), 400)
    again = body | {"steering_vector_id": made["steering_vector_id"]}
    refused(client.post("/generate", json=steered, headers=bob), 404)
    refused(client.post("/behaviors/create", json=again, headers=bob), 404)
    named = client.post("/behaviors/create", json=again | {"behavior_name": "glad"}, headers=ann).json()
    assert named["steering_vector_id"] == made["steering_vector_id"]
    assert [found["behavior_name"] for found in client.get("/behaviors", headers=ann).json()] == [
        "cheerful",
        "glad",
    ]


def test_a_behavior_has_no_more_examples_than_a_vector(connect: Connect) -> None:
    client = connect(max_examples=3)
    ann = signed_up(client, ANN)
    made = client.post("/steering/generate", json=EXAMPLES | {"method": "caa"}, headers=ann).json()
    many = {name: texts * 2 for name, texts in EXAMPLES.items()} | {"behavior_name": "b"}
    for body in (many, many | made):
        assert "4 examples" in refused(client.post("/behaviors/create", json=body, headers=ann), 400)


def test_what_an_account_keeps_is_bounded_listed_and_deleted(connect: Connect, mechanex_home: Path) -> None:
    client = connect(max_vectors=2)
    ann, bob = signed_up(client, ANN), signed_up(client, BOB)
    caa = EXAMPLES | {"method": "caa"}
    first = client.post("/steering/generate", json=caa, headers=ann).json()["steering_vector_id"]
    client.post("/behaviors/create", json=EXAMPLES | {"behavior_name": "so/so?"}, headers=ann)
    for path, body in (
        ("/steering/generate", caa),
        ("/behaviors/create", EXAMPLES | {"behavior_name": "more"}),
    ):
        reason = refused(client.post(path, json=body, headers=ann), 400)
        assert "may keep 2" in reason and "DELETE /steering/vectors/{id}" in reason
    kept = client.get("/steering/vectors", headers=ann).json()
    assert [one["behavior_names"] for one in kept] == [[], ["so/so?"]] and kept[0]["created_at"]
    assert (
        kept[0]["steering_vector_id"] == first and client.get("/steering/vectors", headers=bob).json() == []
    )
    second = kept[1]["steering_vector_id"]
    refused(client.delete(f"/steering/vectors/{first}", headers=bob), 404)
    refused(client.delete("/behaviors/so%2Fso%3F", headers=bob), 404)
    assert "'so/so?'" in refused(client.delete(f"/steering/vectors/{second}", headers=ann), 400)
    assert client.delete("/behaviors/so%2Fso%3F", headers=ann).status_code == 204
    for vector_id in (first, second):
        assert client.delete(f"/steering/vectors/{vector_id}", headers=ann).status_code == 204
        refused(client.delete(f"/steering/vectors/{vector_id}", headers=ann), 404)
        body = {"prompt": "The", "steering_vector_id": vector_id, "steering_strength": 1, "max_tokens": 2}
        refused(client.post("/generate", json=body, headers=ann), 404)
    assert (
        client.get("/steering/vectors", headers=ann).json()
        == client.get("/behaviors", headers=ann).json()
        == []
    )
    assert not list((mechanex_home / "server" / "vectors").iterdir())
    assert client.post("/steering/generate", json=caa, headers=ann).status_code == 200


def test_an_account_that_chose_another_model_is_told(client: TestClient) -> None:
    ann = signed_up(client, ANN)
    account = client.get("/auth/whoami", headers=ann).json()["id"]
    app: Any = client.app
    app.state.store.users.set_model(account, "yesterdays-model")
    reason = refused(client.post("/generate", json={"prompt": "The", "max_tokens": 2}, headers=ann), 400)
    assert "yesterdays-model" in reason and "set-model" in reason
    client.post("/auth/api-keys/set-model", json={"model_name": "mx-tiny"}, headers=ann)
    assert client.post("/generate", json={"prompt": "The", "max_tokens": 2}, headers=ann).status_code == 200


def test_generate_corrects_what_the_server_was_told_to(
    connect: Connect, model: LoadedModel, tmp_path: Path
) -> None:
    lines = [
        {"prompt": prompt, "positive": positive, "negative": negative}
        for prompt, positive, negative in zip(*EXAMPLES.values(), strict=True)
    ]
    file = tmp_path / "cheerful.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in lines))
    # Whoever was here before the operator named the behavior does not decide what every answer is steered by.
    own = EXAMPLES | {"behavior_name": "cheerful", "positive_answers": EXAMPLES["negative_answers"]}
    own["negative_answers"] = EXAMPLES["positive_answers"]
    assert connect().post("/behaviors/create", json=own).status_code == 200
    client = connect(behaviors=(file,), corrected_behaviors=("cheerful",))
    ann = signed_up(client, ANN)
    assert "the server's own" in refused(client.post("/behaviors/create", json=own, headers=ann), 400)
    local = Mechanex().set_local_model(model.model, model.tokenizer)
    local_id = local.steering.generate_vectors(*EXAMPLES.values(), method="caa")
    body = {"prompt": "The man said that", "sampling_method": "greedy", "max_tokens": 16}
    for headers in ({}, ann):
        assert client.post("/generate", json=body, headers=headers).json()[
            "output"
        ] == local.generation.generate(
            "The man said that", 16, "greedy", steering_strength=1, steering_vector=local_id
        )


def test_a_damaged_vector_of_the_operator_is_the_servers_error(
    client: TestClient, mechanex_home: Path
) -> None:
    (mechanex_home / "vectors").mkdir(parents=True, exist_ok=True)
    (mechanex_home / "vectors" / "mine.safetensors").write_bytes(b"junk")
    steered = {"prompt": "The", "steering_vector_id": "mine", "steering_strength": 1, "max_tokens": 2}
    reason = refused(client.post("/generate", json=steered), 500)
    assert "'mine'" in reason and str(mechanex_home) not in reason
    answer = client.post("/v1/completions", json={"prompt": "The", "steering_vector": "mine"})
    assert answer.status_code == 500 and str(mechanex_home) not in answer.text


def test_a_damaged_vector_file_is_the_servers_error(client: TestClient, mechanex_home: Path) -> None:
    vector_id = client.post("/steering/generate", json=EXAMPLES | {"method": "caa"}).json()[
        "steering_vector_id"
    ]
    path = mechanex_home / "server" / "vectors" / f"{vector_id}.safetensors"
    record = SteeringVector.load(path).metadata
    assert record["data_count"] == str(len(EXAMPLES["prompts"])) and record["date"] and record["data_sha256"]
    app: Any = client.app
    app.state.store.library._files._cache.clear()
    path.write_bytes(b"\xff" * 64)
    body = {"prompt": "The", "steering_vector_id": vector_id, "steering_strength": 1, "max_tokens": 2}
    assert "is damaged on the server" in refused(client.post("/generate", json=body), 500)
    assert client.post("/generate", json={"prompt": "The", "max_tokens": 2}).status_code == 200


def test_accounts_work_at_once(client: TestClient) -> None:
    def work(number: int) -> tuple[str, set[str]]:
        who = {"email": f"user{number}@example.org", "password": "correct horse"}
        session = client.post("/auth/signup", json=who).json()["session"]
        keys = set()
        for _ in range(3):
            session = client.post("/auth/refresh", json={"refresh_token": session["refresh_token"]}).json()[
                "session"
            ]
            headers = bearer(session["access_token"])
            keys.add(client.post("/auth/api-keys", json={"name": "k"}, headers=headers).json()["key"])
        body = EXAMPLES | {"behavior_name": "cheerful"}
        made = client.post("/behaviors/create", json=body, headers={"x-api-key": keys.pop()}).json()
        listed = client.get("/behaviors", headers={"x-api-key": keys.pop()}).json()
        return made["steering_vector_id"], {found["steering_vector_id"] for found in listed}

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(work, range(8)))
    assert len({made for made, _ in results}) == 8 and all(listed == {made} for made, listed in results)


# What is too much


@pytest.mark.parametrize(
    "path, body, reason",
    [
        ("/steering/generate", {name: texts * 129 for name, texts in EXAMPLES.items()}, "258 examples"),
        ("/steering/generate", EXAMPLES | {"layer_idxs": [1] * 17}, "17 layers"),
        ("/steering/generate", EXAMPLES | {"positive_answers": ["a " * 100_000, "b"]}, "shorten"),
        ("/steering/generate", EXAMPLES | {"prompts": [[10**9], "b"]}, "token"),
        (
            "/steering/generate",
            EXAMPLES | {"prompts": [[CHAT | {"content": "a " * 100_000}], "b"]},
            "shorten",
        ),
        (
            "/behaviors/create",
            {name: texts * 129 for name, texts in EXAMPLES.items()} | {"behavior_name": "b"},
            "258 examples",
        ),
        ("/generate", {"prompt": [CHAT | {"content": "a " * 100_000}]}, "shorten"),
    ],
)
def test_what_would_hold_the_model_for_long_is_refused(
    shared: TestClient, path: str, body: dict[str, Any], reason: str
) -> None:
    app: Any = shared.app
    before = app.state.engine.metrics.text()
    assert reason in refused(shared.post(path, json=body), 400)
    work = [line for line in before.decode().splitlines() if 'model_seconds_total{kind="other"}' in line]
    assert all(line in app.state.engine.metrics.text().decode() for line in work)


@pytest.mark.parametrize(
    "extra",
    [{"stop": ["x"] * 17}, {"stop": "x" * 1001}, {"stop": ["x" * 1001]}, {f"f{i}": 1 for i in range(256)}],
)
def test_generate_bounds_what_it_reads(shared: TestClient, extra: dict[str, Any]) -> None:
    reason = refused(shared.post("/generate", json={"prompt": "The", **extra}), 422)
    assert "stop" in extra or reason.count("256 are more than enough") == 1
    body = {"prompt": "The", "max_tokens": 1, "stop": ["x" * 1000] * 16}
    assert shared.post("/generate", json=body).status_code == 200


def test_an_account_computes_one_vector_at_a_time(client: TestClient) -> None:
    ann, bob = signed_up(client, ANN), signed_up(client, BOB)
    app: Any = client.app
    begun, release = threading.Event(), threading.Event()

    def hold(adapter: Any) -> None:
        begun.set()
        release.wait(120)

    portal: Any = client.portal
    held = portal.start_task_soon(app.state.engine.scheduler.run, hold)
    assert begun.wait(120)
    body = EXAMPLES | {"method": "caa"}
    with ThreadPoolExecutor(3) as pool:
        waiting = [
            pool.submit(client.post, "/steering/generate", json=body, headers=who) for who in (ann, bob)
        ]
        while len(app.state.engine.scheduler._worker.jobs) < 2:
            time.sleep(0.01)
        answer = client.post("/steering/generate", json=body, headers=ann)
        release.set()
        assert "being computed" in refused(answer, 429) and answer.headers["retry-after"] == "5"
        assert [one.result().status_code for one in waiting] == [200, 200]
    held.result()
    assert client.post("/steering/generate", json=body, headers=ann).status_code == 200


def test_an_optimization_stops_when_nobody_waits_for_it(connect: Connect, mechanex_home: Path) -> None:
    client = connect(request_timeout=0.3)
    many = {name: texts * 60 for name, texts in EXAMPLES.items()}
    assert "longer than" in refused(
        client.post("/steering/generate", json=many | {"layer_idxs": [1, 2, 3]}), 504
    )
    app: Any = client.app
    until(lambda: not app.state.engine.scheduler._worker.jobs.busy)
    assert not list((mechanex_home / "server").glob("vectors/*"))
    assert client.get("/metrics").text.count('model_seconds_total{kind="other"}') == 1


# What never is

GOOD: dict[str, Any] = {
    "/auth/signup": ANN,
    "/auth/login": ANN,
    "/auth/refresh": {"refresh_token": "x"},
    "/auth/api-keys": {"name": "k"},
    "/auth/api-keys/set-model": {"model_name": "mx-tiny"},
    "/generate": {
        "prompt": "The",
        "max_tokens": 1,
        "top_k": 5,
        "top_p": 0.5,
        "stop": ["x"],
        "seed": 1,
        "min_p": 0.1,
    },
    "/steering/generate": EXAMPLES | {"method": "caa", "layer_idxs": [1]},
    "/behaviors/create": EXAMPLES | {"behavior_name": "b", "description": ""},
    "/sae/generate": {
        "prompt": "The",
        "max_new_tokens": 2,
        "behavior_names": [],
        "force_steering": None,
        "action": "report",
        "return_trace": True,
        "sampling_method": "top-k",
        "typical_p": 0.5,
        "seed": 1,
        "stop": ["x"],
    },
    "/attribution-patching/scores": {
        "clean_prompt": "Anna was calm.",
        "corrupted_prompt": "Anna was angry.",
        "target_module_paths": ["model.layers.1"],
        "method": "exact",
        "steps": 1,
        "metric": [" a", 7],
        "align": "tokens",
        "positions": False,
        "edges": False,
    },
    "/raag/generate": {
        "qa_entries": [{"question": "Who was calm?"}],
        "docs": [{"text": "Anna was calm."}],
        "pinecone_index_name": None,
    },
}
HOSTILE: list[Any] = [None, True, -1, 1.5, 10**30, -(10**30), 1e308, float("nan"), float("inf"), "", "\x00", "\ud800",
                      "x" * 100_000, [], {}, [[[]]], [None], ["\ud800"], [{}], {"a": {"b": []}}]  # fmt: skip


@pytest.mark.ci
@pytest.mark.parametrize("path", GOOD)
def test_no_wrong_field_crashes_a_call(shared: TestClient, path: str) -> None:
    client, headers = shared, signed_up(shared, {"email": f"{path}@example.org", "password": "correct horse"})
    for name in GOOD[path]:
        for value in HOSTILE:
            body = json.dumps(GOOD[path] | {name: value})
            answer = client.post(path, content=body, headers=headers | {"content-type": "application/json"})
            assert answer.status_code in (200, 400, 401, 404, 413, 422, 429, 501), (name, value, answer.text)
            assert "detail" in answer.json() or answer.status_code == 200
    for missing in (dict(list(GOOD[path].items())[1:]), GOOD[path] | {"misspelt": 1}):
        if path not in ("/auth/api-keys",) or "misspelt" in missing:
            refused(client.post(path, json=missing, headers=headers), 422)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 50_000, b"null", b"[]", b'"text"', b"1e999", b"\x00",
     b'{"prompt": NaN}'],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/generate", "/auth/login", "/raag/generate"])
def test_no_garbage_crashes_a_call(shared: TestClient, path: str, content: bytes) -> None:
    answer = shared.post(path, content=content, headers={"content-type": "application/json"})
    refused(answer, answer.status_code)
    assert answer.status_code in (400, 413, 422)


def test_a_refused_body_does_not_repeat_the_password(shared: TestClient) -> None:
    body = {"email": "ann@example.org", "password": "hunter2" * 200, "extra": 1}
    assert "hunter2" not in shared.post("/auth/login", json=body).text


def test_the_description_of_the_api_covers_the_contract(shared: TestClient) -> None:
    paths = shared.get("/openapi.json").json()["paths"]
    wanted = {("POST", path) for path in GOOD}
    reads = "/auth/whoami", "/auth/api-keys", "/models", "/behaviors", "/graph", "/paths"
    wanted |= {("GET", path) for path in reads}
    there = {(method.upper(), path) for path, calls in paths.items() for method in calls}
    assert wanted <= there
