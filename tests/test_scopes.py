"""What an API key may do: every route says what it needs, and the server asks it."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from click.testing import CliRunner
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient
from server_process import ServerProcess, serving

from mechanex import AuthenticationError, Mechanex, ValidationError
from mechanex.cli import main
from mechanex.engine.models.resolve import load
from mechanex.server.accounts.scopes import NEEDS, SCOPES
from mechanex.server.app import create_app
from mechanex.server.page.files import page_paths
from mechanex.server.settings import ServerSettings

pytestmark = pytest.mark.slow

ANN = {"email": "ann@example.org", "password": "correct horse"}
EXAMPLES = {"prompts": ["a"], "positive_answers": [" b"], "negative_answers": [" c"], "method": "caa"}
TEXT = {"prompt": "Anna", "max_tokens": 1}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MECHANEX_HOME", str(tmp_path_factory.mktemp("home")))
        app = create_app(ServerSettings(host="127.0.0.1"), load("mx-tiny", backend="transformers"))
    with TestClient(app, "http://localhost", raise_server_exceptions=False) as client:
        yield client


@pytest.fixture(scope="module")
def session(client: TestClient) -> dict[str, str]:
    """Headers of a log-in."""
    made = client.post("/auth/signup", json=ANN).json()["session"]
    return {"authorization": f"Bearer {made['access_token']}"}


def routes(found: Any) -> Iterator[APIRoute]:
    for route in found.routes:
        if isinstance(route, APIRoute):
            yield route
        elif hasattr(route, "original_router"):  # how FastAPI of today keeps a router that is included
            yield from routes(route.original_router)


def test_every_route_says_what_it_needs(client: TestClient) -> None:
    there = {
        f"{method} {route.path}"
        for route in routes(client.app)
        for method in route.methods
        if method not in ("HEAD", "OPTIONS")
    }
    described = client.get("/openapi.json").json()["paths"]
    assert len(there) > sum(map(len, described.values())) > 30  # the walk found them all
    files = {f"GET {path}" for path in page_paths()}
    assert there - set(NEEDS) - files == set(), "name what each of these needs in accounts/scopes.py"
    assert set(NEEDS) - there == set(), "these routes are gone"


@pytest.mark.parametrize("call", sorted(NEEDS))
def test_a_key_does_what_its_scopes_allow_and_nothing_else(
    client: TestClient, session: dict[str, str], call: str
) -> None:
    method, _, path = call.partition(" ")
    url = path.partition("{")[0] + ("nothing" if "{" in path else "")
    for scope in SCOPES:
        made = client.post("/auth/api-keys", json={"scopes": [scope]}, headers=session).json()
        answer = client.request(method, url, headers={"x-api-key": made["key"]}, json={"nonsense": 1})
        allowed = NEEDS[call] in ("nothing", "any", scope)
        assert (answer.status_code == 403) != allowed, (scope, answer.text)
        if not allowed and NEEDS[call] in SCOPES:
            assert f"needs the scope {NEEDS[call]!r} and has {scope!r}" in answer.json().get(
                "detail", answer.text
            )
        # Beside a log-in's token, the key's scopes bound nothing.
        both = {"x-api-key": made["key"], **session}
        if NEEDS[call] != "operator" and method == "GET":
            assert client.request(method, url, headers=both).status_code < 403 or "{" in path


def test_a_key_of_one_scope_works_in_it(client: TestClient, session: dict[str, str]) -> None:
    key = client.post("/auth/api-keys", json={"scopes": ["generate"]}, headers=session).json()["key"]
    mine = {"x-api-key": key}
    assert client.post("/generate", json=TEXT, headers=mine).status_code == 200
    assert client.post("/v1/completions", json=TEXT, headers=mine).status_code == 200
    refused = client.post("/steering/generate", json=EXAMPLES, headers=mine)
    assert refused.status_code == 403 and "'vectors'" in refused.json()["detail"]


def test_a_key_makes_no_keys(client: TestClient, session: dict[str, str]) -> None:
    key = client.post("/auth/api-keys", json={}, headers=session).json()["key"]
    answer = client.post("/auth/api-keys", json={}, headers={"x-api-key": key})
    assert answer.status_code == 403 and "of a log-in with the password" in answer.json()["detail"]
    beside = client.post("/auth/api-keys", json={}, headers={"x-api-key": key, **session})
    assert beside.status_code == 200


def test_a_key_ends(client: TestClient, session: dict[str, str]) -> None:
    app: Any = client.app
    made = client.post("/auth/api-keys", json={"expires_days": 2}, headers=session).json()
    left = datetime.fromisoformat(made["expires_at"]) - datetime.now(timezone.utc)
    assert timedelta(days=1.99) < left <= timedelta(days=2) and made["scopes"] is None
    short, _ = app.state.store.keys.create(
        client.get("/auth/whoami", headers=session).json()["id"], "x", lifetime=-1
    )
    for headers in ({"x-api-key": short}, {"authorization": f"Bearer {short}"}):
        answer = client.get("/models", headers=headers)
        assert answer.status_code == 401 and "API key has expired" in answer.json()["detail"]
    assert client.get("/models", headers={"x-api-key": short, **session}).status_code == 200


@pytest.mark.parametrize(
    "body",
    [{"scopes": []}, {"scopes": ["root"]}, {"expires_days": 0}, {"expires_days": -1}, {"scopes": "admin"}],
)
def test_what_no_key_can_be(client: TestClient, session: dict[str, str], body: dict[str, Any]) -> None:
    assert client.post("/auth/api-keys", json=body, headers=session).status_code in (400, 422)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with serving(home=tmp_path_factory.mktemp("server")) as running:
        yield running


def test_from_python_and_the_command_line(server: ServerProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MECHANEX_BASE_URL", server.url)
    client = Mechanex()
    client.signup(ANN["email"], ANN["password"])
    made = client.create_api_key("robot", scopes=["generate"], expires_days=1)
    assert made["scopes"] == ["generate"] and made["expires_at"]
    with pytest.raises(ValidationError, match="list of names"):
        client.create_api_key("robot", scopes="generate")
    robot = Mechanex(api_key=made["key"])
    assert robot.whoami()["email"] == ANN["email"]
    for forbidden in (robot.list_api_keys, robot.create_api_key, lambda: robot.list_sessions()):
        with pytest.raises(AuthenticationError, match=r"\[403\]"):
            forbidden()
    arguments = [
        "create-api-key",
        "--name",
        "two",
        "--scope",
        "vectors",
        "--scope",
        "generate",
        "--expires-days",
        "3",
    ]
    assert CliRunner().invoke(main, arguments).exit_code == 0
    table = CliRunner().invoke(main, ["list-api-keys"]).output
    assert "vectors" in table and "generate" in table
    assert {tuple(key["scopes"]) for key in client.list_api_keys()} == {
        ("generate",),
        ("vectors", "generate"),
    }


@pytest.mark.parametrize("scopes", [5, "generate", 1.5, True])
def test_scopes_are_a_list(scopes: Any) -> None:
    with pytest.raises(ValidationError, match="scopes is a list of names"):
        Mechanex(base_url="http://127.0.0.1:1", api_key="k").create_api_key(scopes=scopes)
