"""Running a server: keys, probes, metrics, limits, logs, clients that vanish, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
import uvicorn
from click.testing import CliRunner
from openai import OpenAI
from server_calls import ENDLESS, PROMPT, call, streaming, until
from server_process import ServerProcess, serving

import mechanex
from mechanex.cli import main
from mechanex.engine.models.resolve import load
from mechanex.engine.vectors import SteeringVector
from mechanex.errors import MechanexError, NotFoundError, ValidationError
from mechanex.server.http.connections import listen
from mechanex.server.settings import ServerSettings


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    arguments = ("--max-batch", "4", "--max-waiting", "3", "--cors-origin", "https://app.example")
    with serving(*arguments, home=tmp_path_factory.mktemp("home")) as running:
        yield running


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server that other machines reach, and that was given no key."""
    with serving(home=tmp_path_factory.mktemp("home"), host="0.0.0.0") as running:
        yield running


def test_probes_need_no_key_and_everything_else_does(guarded: ServerProcess) -> None:
    assert json.loads(guarded.get("/health"))["status"] == "ok"
    assert json.loads(guarded.get("/ready"))["status"] == "ready"
    for method, path in (
        ("GET", "/v1/models"),
        ("GET", "/metrics"),
        ("GET", "/openapi.json"),
        ("GET", "/models"),
        ("POST", "/v1/completions"),
        ("POST", "/v1/chat/completions"),
        ("POST", "/generate"),
        ("POST", "/auth/signup"),
    ):
        body = {"prompt": "a", "email": "a@b.co", "password": "a long password"} if method == "POST" else None
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"x_api_key": "wrong"},
            {"Authorization": "mx-"},
        ):
            status, _, answer = call(guarded, method, path, body, **headers)
            assert status in (401, 403), (path, headers, answer)
            assert ("error" in json.loads(answer)) == path.startswith("/v1/")


def test_a_key_is_made_printed_once_and_works(guarded: ServerProcess) -> None:
    (key,) = re.findall(r"mx-[A-Za-z0-9_-]{30,}", guarded.output())
    assert call(guarded, "GET", "/v1/models", x_api_key=key)[0] == 200
    client = OpenAI(base_url=f"{guarded.url}/v1", api_key=key, max_retries=0)
    assert client.models.list().data
    assert call(guarded, "GET", "/metrics", Authorization=f"bearer {key}")[0] == 200
    with pytest.raises(openai.AuthenticationError) as error:
        OpenAI(base_url=f"{guarded.url}/v1", api_key=key[:-1], max_retries=0).models.list()
    assert error.value.code == "invalid_api_key"
    assert guarded.output().count(key) == 1


def test_the_key_of_the_environment(tmp_path: Path) -> None:
    with serving(
        home=tmp_path, host="0.0.0.0", environment={"MECHANEX_SERVER_KEY": "s3cret-of-theirs"}
    ) as running:
        assert call(running, "GET", "/v1/models", Authorization="Bearer s3cret-of-theirs")[0] == 200
        assert call(running, "GET", "/v1/models", Authorization="Bearer other")[0] == 401
        # An account's API key opens the server too.
        account = {"email": "anna@example.com", "password": "a long password"}
        status, _, answer = call(
            running, "POST", "/auth/signup", account, Authorization="Bearer s3cret-of-theirs"
        )
        assert status == 200, answer
        token = json.loads(answer)["session"]["access_token"]
        _, _, answer = call(running, "POST", "/auth/api-keys", {"name": "k"}, Authorization=f"Bearer {token}")
        made = json.loads(answer)
        key = made.get("key") or made["api_key"]
        assert call(running, "GET", "/v1/models", Authorization=f"Bearer {key}")[0] == 200
        assert "s3cret-of-theirs" not in running.output()
        assert key not in running.output()


def test_a_loopback_server_takes_any_key_or_none(server: ServerProcess) -> None:
    for headers in ({}, {"Authorization": "Bearer anything"}, {"x_api_key": "anything"}):
        assert call(server, "GET", "/v1/models", **headers)[0] == 200
    # The bound address decides, not what a proxy says of the client.
    assert call(server, "GET", "/v1/models", X_Forwarded_For="8.8.8.8")[0] == 200


@pytest.mark.parametrize(
    "host, loopback",
    [
        ("127.0.0.1", True),
        ("127.8.9.1", True),
        ("localhost", True),
        ("::1", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.0.1", False),
        ("example.com", False),
        ("localhost.example.com", False),
        ("0", False),
    ],
)
def test_what_counts_as_loopback(host: str, loopback: bool) -> None:
    assert ServerSettings(host=host).is_loopback is loopback


def test_request_ids_and_unknown_urls(server: ServerProcess) -> None:
    assert call(server, "GET", "/health", X_Request_Id="mine-1")[1]["x-request-id"] == "mine-1"
    made = call(server, "GET", "/health", X_Request_Id="not a plain word")[1]["x-request-id"]
    assert re.fullmatch(r"[0-9a-f]{32}", made)
    status, _, answer = call(server, "GET", "/v1/nothing")
    assert status == 404
    assert json.loads(answer)["error"]["code"] == "unknown_url"
    assert call(server, "GET", "/v1/completions")[0] == 405
    assert json.loads(call(server, "GET", "/nothing")[2])["detail"]


def test_browsers_of_named_origins_only(server: ServerProcess, guarded: ServerProcess) -> None:
    def allowed(running: ServerProcess, origin: str) -> str | None:
        headers = {"Origin": origin, "Access_Control_Request_Method": "POST"}
        return call(running, "OPTIONS", "/v1/completions", **headers)[1].get("access-control-allow-origin")

    assert allowed(server, "https://app.example") == "https://app.example"
    assert allowed(server, "https://evil.example") is None
    assert allowed(guarded, "https://app.example") is None


def test_logs_hold_requests_and_no_prompts(server: ServerProcess) -> None:
    secret = "My password is swordfish"
    body = {"prompt": secret, "max_tokens": 2}
    call(server, "POST", "/v1/completions", body, X_Request_Id="logged-1", Authorization="Bearer hidden-key")
    call(server, "POST", "/v1/completions", {**body, "n": -1, "stop": [secret]}, X_Request_Id="logged-2")
    until(lambda: "logged-2" in server.output())
    lines = [json.loads(line) for line in server.output().splitlines() if line.startswith("{")]
    found = {line["id"]: line for line in lines if line.get("event") == "request"}
    assert found["logged-1"]["status"] == 200
    assert found["logged-1"]["path"] == "/v1/completions"
    assert found["logged-1"]["seconds"] > 0
    assert found["logged-2"]["status"] == 400
    # A token spans the join of prompt and answer, which is logged: without the texts.
    spanning = {
        "prompts": ["My secret diagnosis is cance"],
        "positive_answers": ["r zebraquux, badly"],
        "negative_answers": [" flu"],
        "method": "caa",
    }
    assert call(server, "POST", "/steering/generate", spanning)[0] == 200
    until(lambda: "spans the join" in server.output())
    for text in ("swordfish", "zebraquux", "diagnosis"):
        assert text not in server.output()
    assert "hidden-key" not in server.output()


def test_metrics_count_what_happened(server: ServerProcess) -> None:
    names = {
        "requests": 'mechanex_requests_total{path="/v1/completions",status="200"}',
        "refused": 'mechanex_requests_total{path="/v1/completions",status="400"}',
        "prompt": "mechanex_prompt_tokens_total",
        "chosen": "mechanex_completion_tokens_total",
    }
    before = {key: server.metric(name) for key, name in names.items()}
    _, _, answer = call(server, "POST", "/v1/completions", {"prompt": PROMPT, "max_tokens": 7, "n": 2})
    usage = json.loads(answer)["usage"]
    call(server, "POST", "/v1/completions", {"prompt": PROMPT, "n": -1})
    after = {key: server.metric(name) - before[key] for key, name in names.items()}
    assert (after["requests"], after["refused"]) == (1, 1)
    assert after["chosen"] == usage["completion_tokens"]
    assert after["prompt"] == usage["prompt_tokens"]  # read once for both answers
    assert server.metric('mechanex_model_seconds_total{kind="decode"}') > 0
    assert server.metric("mechanex_waiting_requests") == 0
    kept = server.metric("mechanex_prefix_bytes")
    call(server, "POST", "/v1/completions", {"prompt": [*range(40, 90)], "max_tokens": 2})
    assert server.metric("mechanex_prefix_bytes") > kept


def test_a_head_counts_as_a_request_to_its_path(server: ServerProcess) -> None:
    name = 'mechanex_requests_total{path="/v1/models",status="200"}'
    call(server, "GET", "/v1/models")
    before = server.metric(name)
    assert call(server, "HEAD", "/v1/models")[0] == 200
    assert server.metric(name) - before == 1


@pytest.mark.parametrize("stream", [True, False])
def test_clients_that_vanish_free_their_places(server: ServerProcess, stream: bool) -> None:
    cancelled = server.metric('mechanex_answers_total{reason="cancelled"}')
    if stream:
        with contextlib.ExitStack() as clients:
            for _ in range(4):
                clients.enter_context(streaming(server, ENDLESS))
            assert server.metric("mechanex_running_requests") > 0
    else:
        raw = json.dumps({**ENDLESS, "n": 3}).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(raw)}"
        with socket.create_connection(("127.0.0.1", server.port), timeout=120) as client:
            client.sendall(head.encode() + b"\r\n\r\n" + raw)
            until(lambda: server.metric("mechanex_running_requests") == 3)
    until(lambda: server.metric("mechanex_running_requests") == 0)
    assert server.metric('mechanex_answers_total{reason="cancelled"}') > cancelled


def test_a_full_queue_is_429_with_a_time(server: ServerProcess) -> None:
    with contextlib.ExitStack() as clients:
        for _ in range(4):
            clients.enter_context(streaming(server, ENDLESS))
        waiting = [
            threading.Thread(
                target=call, args=(server, "POST", "/v1/completions", {**ENDLESS, "max_tokens": 1})
            )
            for _ in range(3)
        ]
        for one in waiting:
            one.start()
        until(lambda: server.metric("mechanex_waiting_requests") == 3)
        client = OpenAI(base_url=f"{server.url}/v1", api_key="k", max_retries=0)
        with pytest.raises(openai.RateLimitError) as error:
            client.completions.create(model="mx-tiny", prompt=PROMPT)
        assert int(error.value.response.headers["retry-after"]) >= 1
    for one in waiting:
        one.join(120)
    until(lambda: server.metric("mechanex_running_requests") == 0)


@pytest.mark.skipif(sys.platform == "win32", reason="limits of POSIX")
def test_connections_that_say_nothing_lock_nobody_out(tmp_path: Path) -> None:
    program = (
        "import resource, sys, mechanex\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (600, 600))\n"
        "import mechanex.server.http.head_deadline as head\n"
        "head.HEAD_SECONDS = 3.0\n"
        "mechanex.Mechanex().serve('mx-tiny', host='127.0.0.1', port=int(sys.argv[2]))\n"
    )
    with (
        serving(home=tmp_path, program=program) as running,
        contextlib.ExitStack() as clients,
    ):
        busy = clients.enter_context(streaming(running, ENDLESS))
        silent = [socket.create_connection(("127.0.0.1", running.port), timeout=120) for _ in range(800)]
        for one in silent:
            clients.callback(one.close)
        for one in silent[::2]:
            with contextlib.suppress(OSError):  # some have had to make way
                one.sendall(b"GET /health HTTP/1.1\r\nHost: loc")
        assert json.loads(running.get("/health"))["status"] == "ok"
        assert call(running, "POST", "/v1/completions", {"prompt": PROMPT, "max_tokens": 1})[0] == 200
        # Many that come at once make as many others go.
        for _ in range(6):
            burst = [socket.create_connection(("127.0.0.1", running.port), timeout=120) for _ in range(60)]
            for one in burst:
                clients.callback(one.close)
        assert json.loads(running.get("/health"))["status"] == "ok"
        # Half a head is no reason to stay either; an answer that is being written is.
        for one in silent:
            with contextlib.suppress(ConnectionError):
                assert one.recv(100) == b""
        assert busy.recv(100) != b""
        assert "Traceback" not in running.output() and len(running.output()) < 100_000


def test_a_connection_that_owes_a_body_is_closed(guarded: ServerProcess) -> None:
    """Its request was answered without its body; nothing that it sends after that keeps it for ever."""
    with socket.create_connection(("127.0.0.1", guarded.port), timeout=120) as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n")
        seen = b""
        while b"\r\n\r\n" not in seen:
            seen += client.recv(4096)
        assert b" 401 " in seen
        client.sendall(b"x")
        until_closed = time.monotonic() + 120
        with contextlib.suppress(ConnectionError):
            while client.recv(4096):
                if time.monotonic() > until_closed:
                    raise TimeoutError("the connection stays open")


@pytest.fixture
def never(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that does start is a failed test, not one that never ends."""

    def run(*_: Any) -> None:
        raise AssertionError("it serves")

    monkeypatch.setattr(uvicorn.Server, "run", run)


def test_what_the_command_refuses(tmp_path: Path, never: None) -> None:
    taken = socket.socket()
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "v.safetensors").write_bytes(b"no vector")
    (tmp_path / "other").mkdir()
    SteeringVector({1: torch.ones(7)}).save(tmp_path / "other" / "v.safetensors")
    (tmp_path / "named").mkdir()
    SteeringVector({1: torch.ones(128)}).save(tmp_path / "named" / "calm (1).safetensors")
    (tmp_path / "no.sqlite").write_bytes(b"not a database, but long enough to be looked at" * 30)
    for arguments, text in (
        (["--port", str(taken.getsockname()[1])], "can't listen"),
        (["--host", "203.0.113.7"], "can't listen"),
        (["--use-vllm"], "pip install vllm"),
        (["--vectors", str(tmp_path / "bad")], "v.safetensors"),
        (["--vectors", str(tmp_path / "other")], "7 wide"),
        (["--vectors", str(tmp_path / "named")], "(1).safetensors' in"),
        (["--behaviors", "nothing_like_it"], "nothing_like_it"),
        (["--corrected-behavior", "unheard_of"], "unheard_of"),
        (["--database", "nonsense://there"], "nonsense"),
        (["--database", str(tmp_path / "no.sqlite")], "Error: the server's database failed (file is not"),
    ):
        host = [] if "--host" in arguments else ["--host", "127.0.0.1"]
        port = [] if "--port" in arguments else ["--port", "0"]
        result = CliRunner().invoke(main, ["serve", "mx-tiny", *host, *port, *arguments])
        assert result.exit_code == 1, (arguments, result.output)
        assert text in result.output, (arguments, result.output)
        assert "Traceback" not in result.output
    taken.close()


def test_what_serve_refuses(never: None) -> None:
    client = mechanex.Mechanex()
    with pytest.raises(MechanexError, match="needs a model"):
        client.serve()
    client.set_local_model(load("mx-tiny", backend="transformers").model)
    with pytest.raises(ValidationError, match="pip install vllm"):
        client.serve(use_vllm=True)
    with pytest.raises(ValidationError, match="nonsense"):
        client.serve(nonsense=1)
    with pytest.raises(ValidationError, match="port"):
        client.serve(port=70_000)
    with pytest.raises(ValidationError, match="list"):
        client.serve(corrected_behaviors="calm")  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match="unheard_of"):
        client.serve(host="127.0.0.1", port=0, corrected_behaviors=["unheard_of"])
    with pytest.raises(NotFoundError):
        client.serve(host="127.0.0.1", port=0, vectors="/nowhere/at/all")


def test_answers_are_sent_at_once() -> None:
    async def accepted() -> int:
        options: list[int] = []

        def note(_: Any, writer: asyncio.StreamWriter) -> None:
            options.append(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        with listen(ServerSettings(host="127.0.0.1", port=0)) as listening:
            async with await asyncio.start_server(note, sock=listening):
                _, writer = await asyncio.open_connection(*listening.getsockname())
                while not options:
                    await asyncio.sleep(0.01)
                writer.close()
        return options[0]

    assert asyncio.run(accepted()) != 0


def test_help_names_the_key(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mechanex.cli", "serve", "--help"], capture_output=True, text=True, check=True
    )
    assert "MECHANEX_SERVER_KEY" in done.stdout
