"""No body crashes the server, or disturbs another request: what schemathesis makes up, and what attackers send."""

from __future__ import annotations

import http.client
import json
import random
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from server_process import ServerProcess, serving

from mechanex.server.axionic.bodies import GenerateBody, RaagBody, SteeringBody
from mechanex.server.openai.bodies import ChatBody, CompletionBody

pytestmark = [pytest.mark.ci, pytest.mark.slow]

ENDPOINTS = ("/v1/completions", "/v1/chat/completions", "/generate", "/steering/generate", "/auth/login")
VICTIM = {"prompt": "Anna went to the market on Friday.", "max_tokens": 30, "temperature": 0}
RELAXED = settings(
    max_examples=10,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with serving("--log-level", "warning", home=tmp_path_factory.mktemp("home")) as running:
        yield running


def post(
    server: ServerProcess, path: str, body: bytes, content_type: str = "application/json"
) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=300)
    try:
        connection.request("POST", path, body, {"Content-Type": content_type})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def victim(server: ServerProcess) -> str:
    status, body = post(server, "/v1/completions", json.dumps(VICTIM).encode())
    assert status == 200
    return str(json.loads(body)["choices"][0]["text"])


@pytest.fixture(scope="module")
def undisturbed(server: ServerProcess) -> str:
    """The answer that the victim gets when nobody else is there."""
    return victim(server)


def test_the_documented_api_never_fails(server: ServerProcess) -> None:
    schema = schemathesis.openapi.from_dict(json.loads(server.get("/openapi.json")))
    tried: set[str] = set()
    for found in schema.get_all_operations():
        operation = found.ok()

        @given(case=operation.as_strategy())
        @RELAXED
        def attempt(case: Any) -> None:
            answer = case.call(base_url=server.url, timeout=300)
            assert answer.status_code not in (500, 502, 503, 504), answer.text
            of_openai = case.path.startswith(("/v1/", "/tokenize", "/detokenize", "/version"))
            if answer.status_code >= 400 and of_openai:
                of_anthropic = case.path.startswith("/v1/messages")
                names = {"message", "type"} if of_anthropic else {"message", "type", "param", "code"}
                assert set(answer.json()["error"]) == names
            elif answer.status_code >= 400:
                assert answer.json()["detail"]

        attempt()
        tried.add(operation.path)
    assert {"/v1/completions", "/v1/chat/completions", "/v1/models", "/generate", "/metrics"} <= tried


BODIES = {
    "empty": b"",
    "no JSON": b"hello",
    "a list": b"[]",
    "null": b"null",
    "a number": b"1",
    "deep lists": b"[" * 100_000,
    "deep objects": b'{"prompt":' * 50_000,
    "deep and closed": b'{"prompt":' + b"[" * 20_000 + b"]" * 20_000 + b"}",
    "deep where it is allowed": b'{"prompt":"a","metadata":' + b'{"a":' * 900 + b"1" + b"}" * 900 + b"}",
    "invalid UTF-8": b'{"prompt": "\xff\xfe\xfa"}',
    "half a surrogate pair": b'{"prompt": "\\ud83d", "messages": [{"role": "user", "content": "\\udc00"}]}',
    "surrogates in a name": b'{"prompt": "a", "behavior_names": ["\\ud800"], "steering_vector": "\\ud800"}',
    "surrogates in a key": b'{"prompt": "a", "\\ud800": 1, "logit_bias": {"\\ud800": 1}}',
    "NUL": b'{"prompt": "\\u0000\\u0000", "max_tokens": 2}',
    "NaN": b'{"prompt": "a", "temperature": NaN, "steering_strength": NaN, "max_new_tokens": NaN}',
    "infinity": b'{"prompt": "a", "temperature": -Infinity, "top_p": Infinity}',
    "1e999": b'{"prompt": "a", "temperature": 1e999, "logit_bias": {"1": 1e999}}',
    "a long number": b'{"prompt": "a", "max_tokens": ' + b"9" * 10_000 + b"}",
    "a large number": b'{"prompt": "a", "max_tokens": 1' + b"0" * 400 + b', "seed": 1' + b"0" * 40 + b"}",
    "large token ids": b'{"prompt": [1' + b"0" * 30 + b", 5]}",
    "negative token ids": b'{"prompt": [-5, -6]}',
    "mixed prompt": b'{"prompt": ["a", 1, ["b"], null]}',
    "UTF-16": '{"prompt": "a"}'.encode("utf-16"),
    "keys twice": b'{"prompt": "a", "prompt": 1, "max_tokens": 1}',
    "many keys": b"{" + b",".join(b'"k%d": 1' % i for i in range(50_000)) + b"}",
    "many stops": json.dumps({"prompt": "a", "stop": ["x"] * 10_000}).encode(),
    "many prompts": json.dumps({"prompt": ["a"] * 10_000}).encode(),
    "many messages": json.dumps({"messages": [{"role": "user", "content": "a"}] * 20_000}).encode(),
    "many biases": json.dumps({"prompt": "a", "logit_bias": {str(i): 1 for i in range(2_000)}}).encode(),
    "many vectors": json.dumps({"prompt": "a", "steering": [{"vector": "x"}] * 5_000}).encode(),
    "many wrong prompts": b'{"prompt": [' + b'"", 0, ' * 100_000 + b"0]}",
    "many objects for prompts": b'{"prompt": [' + b"{}," * 200_000 + b"0]}",
    "many lists of objects": b'{"prompt": [' + b"[{}]," * 120_000 + b"[0]]}",
    "many wrong examples": b'{"positive_answers": [], "negative_answers": [], "prompts": ['
    + b"{}," * 200_000
    + b"0]}",
    "many wrong parts": b'{"messages": [{"role": "user", "content": [' + b"{}," * 200_000 + b"0]}]}",
    "many wrong fields": b'{"prompt": "a", "metadata": {'
    + b",".join(b'"%d":1' % i for i in range(60_000))
    + b"}}",
    "token ids beyond any integer of C": b'{"prompt": [4294967296, 5], "echo": true}',
    "control characters": bytes(range(256)),
    "a prompt of 3 MB": json.dumps({"prompt": "a b " * 750_000}).encode(),
    "a prompt of 10 MB": json.dumps({"prompt": "word " * 2_000_000}).encode(),
    "a word of 3 MB": json.dumps({"prompt": "a" * 3_000_000, "max_tokens": 1}).encode(),
    "a chat of 3 MB": json.dumps({"messages": [{"role": "user", "content": "x" * 3_000_000}]}).encode(),
    "a stop of 1 MB": json.dumps({"prompt": "a", "stop": "x" * 1_000_000, "max_tokens": 4}).encode(),
}


@pytest.mark.parametrize("name", BODIES)
def test_hostile_bodies_are_refused(server: ServerProcess, name: str, undisturbed: str) -> None:
    for path in ENDPOINTS:
        status, answer = post(server, path, BODIES[name])
        assert status < 500, (path, answer[:300])
        if status >= 400:
            error = json.loads(answer)
            assert error.keys() in ({"error"}, {"detail"})
            assert len(answer) < 20_000  # what was sent is not sent back
    assert victim(server) == undisturbed


@pytest.mark.parametrize("name", [name for name in BODIES if name.startswith("many")])
def test_a_wrong_body_is_told_in_few_words(name: str) -> None:
    """Each error takes the event loop time, in which nobody else is served: a million of them take half a minute."""
    given = json.loads(BODIES[name])
    for body in (CompletionBody, ChatBody, SteeringBody, GenerateBody, RaagBody):
        try:
            body.model_validate(given)
        except ValidationError as error:
            assert error.error_count() < 20


def test_a_prompt_of_10_mb_is_named_as_too_large(server: ServerProcess) -> None:
    status, answer = post(server, "/v1/completions", BODIES["a prompt of 10 MB"])
    assert status == 413
    assert json.loads(answer)["error"]["code"] == "request_too_large"


def test_other_content_types_are_refused(server: ServerProcess) -> None:
    for content_type in (
        "text/plain",
        "application/xml",
        "multipart/form-data",
        "application/x-pickle",
        "\t;;=,",
    ):
        status, _ = post(server, "/v1/completions", json.dumps(VICTIM).encode(), content_type)
        assert 400 <= status < 500


def _json() -> st.SearchStrategy[Any]:
    leaves = (
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=True) | st.text() | st.just("mx-tiny")
    )
    return st.recursive(
        leaves, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8
    )


FIELDS = (
    "prompt",
    "messages",
    "model",
    "max_tokens",
    "temperature",
    "top_p",
    "n",
    "stop",
    "stream",
    "seed",
    "logit_bias",
    "logprobs",
    "echo",
    "steering",
    "steering_vector",
    "steering_strength",
    "behavior_names",
    "force_steering",
    "metadata",
)


@given(
    path=st.sampled_from(ENDPOINTS),
    fields=st.dictionaries(st.sampled_from(FIELDS), _json(), max_size=4),
    base=st.sampled_from([{}, {"prompt": "Hello", "max_tokens": 2}]),
)
@settings(RELAXED, max_examples=150)
def test_fields_of_any_kind(
    server: ServerProcess, path: str, fields: dict[str, Any], base: dict[str, Any]
) -> None:
    body = json.dumps({**base, **fields}).encode()
    status, answer = post(server, path, body)
    assert status < 500, (body[:500], answer[:300])


def test_bytes_that_are_no_http(server: ServerProcess, undisturbed: str) -> None:
    draw = random.Random(0)
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", server.port), timeout=120) as raw:
            raw.sendall(draw.randbytes(200) + b"\r\n\r\n")
            raw.recv(1000)
    for head in (
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999999999999\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nX-Request-Id: a\x00b\r\nAuthorization: Bearer \xff\xfe\r\n\r\n",
    ):
        with socket.create_connection(("127.0.0.1", server.port), timeout=120) as raw:
            try:
                raw.sendall(head)
                raw.recv(1000)
            except ConnectionError:
                pass  # refused before it was sent
    assert victim(server) == undisturbed


def test_a_body_without_a_length_is_cut_at_the_limit(server: ServerProcess) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=120) as raw:
        raw.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
        try:
            for _ in range(100):
                raw.sendall(chunk)
            raw.sendall(b"0\r\n\r\n")
        except ConnectionError:
            pass  # it had enough
        answer = raw.recv(1000)
    assert answer.startswith(b"HTTP/1.1 413")


def test_many_hostile_requests_at_once_leave_the_others_alone(
    server: ServerProcess, undisturbed: str
) -> None:
    stop = threading.Event()

    def attack(seed: int) -> None:
        draw = random.Random(seed)
        names = [name for name in BODIES if len(BODIES[name]) < 200_000]
        while not stop.is_set():
            post(server, draw.choice(ENDPOINTS), BODIES[draw.choice(names)])

    attackers = [threading.Thread(target=attack, args=(i,)) for i in range(3)]
    for attacker in attackers:
        attacker.start()
    try:
        assert [victim(server) for _ in range(3)] == [undisturbed] * 3
    finally:
        stop.set()
        for attacker in attackers:
            attacker.join()
    assert "Traceback" not in server.output()
