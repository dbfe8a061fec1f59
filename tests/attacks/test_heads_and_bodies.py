"""What anyone may send, over real sockets: bodies that hold up the event loop, heads that lie about who sent them."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import threading
from collections.abc import Iterator

import pytest
from server_calls import call
from server_process import ServerProcess, serving

from mechanex.errors import RateLimitError, ValidationError
from mechanex.server.axionic.guards import HASHES_AT_ONCE, HASHES_WAITING, Guards
from mechanex.server.settings import ServerSettings

pytestmark = [pytest.mark.ci, pytest.mark.slow]

KEY = {"MECHANEX_SERVER_KEY": "a-key-of-the-operator"}
REFRESH = {"refresh_token": "mxr-none"}
NESTED = b'{"email": [' + b"[]," * 1_300_000 + b"[]]}"
A_MINUTE = 60


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with serving(home=tmp_path_factory.mktemp("home"), environment=KEY) as running:
        yield running


def answer_to(server: ServerProcess, raw: bytes) -> bytes:
    """What a connection is told that sends this and no more."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(raw)
        told = b""
        while part := connection.recv(65536):
            told += part
    return told


@pytest.mark.parametrize("path", ["/auth/login", "/auth/refresh", "/auth/signup", "/auth/api-keys"])
def test_credentials_of_megabytes_are_refused_by_their_length(server: ServerProcess, path: str) -> None:
    told = answer_to(
        server,
        b"POST %s HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer %s\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n"
        % (path.encode(), KEY["MECHANEX_SERVER_KEY"].encode(), len(NESTED))
        + NESTED,
    )
    assert told.startswith(b"HTTP/1.1 413") and b"8192 bytes" in told


def test_and_while_they_are_read(server: ServerProcess) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    chunks = (NESTED[at : at + 4096] for at in range(0, 40_960, 4096))
    connection.request(
        "POST", "/auth/refresh", chunks, {"Content-Type": "application/json"}, encode_chunked=True
    )
    assert connection.getresponse().status == 413
    connection.close()


def test_a_body_of_a_million_lists_is_not_parsed(server: ServerProcess) -> None:
    for path in ("/v1/completions", "/generate", "/steering/generate"):
        status, _, told = call(
            server, "POST", path, {"prompt": [[]] * 20_000}, x_api_key=KEY["MECHANEX_SERVER_KEY"]
        )
        assert status == 400 and b"more than 10000 lists and objects" in told
    # Where they are few, a long body is read as a short one is.
    status, _, told = call(
        server,
        "POST",
        "/v1/completions",
        {"prompt": 'f(x[0], {\\"a\\": 1}); ' * 20_000, "max_tokens": 1},
        x_api_key=KEY["MECHANEX_SERVER_KEY"],
    )
    assert status == 400 and b"context" in told


def test_both_a_length_and_chunks_are_refused_and_end_the_connection(server: ServerProcess) -> None:
    body = json.dumps(REFRESH).encode()
    smuggled = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    told = answer_to(
        server,
        b"POST /auth/refresh HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 4\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(body), body) + smuggled,
    )
    assert told.startswith(b"HTTP/1.1 400") and told.count(b"HTTP/1.1") == 1


def statuses(server: ServerProcess, most: int) -> list[int]:
    """Of requests, each with another forwarded address, until one is refused or there were so many."""
    found: list[int] = []
    while len(found) < most and 429 not in found:
        sender = f"203.0.113.{len(found) % 250}"
        found.append(call(server, "POST", "/auth/refresh", REFRESH, X_Forwarded_For=sender)[0])
    return found


def test_who_a_request_is_forwarded_for_is_not_believed(tmp_path_factory: pytest.TempPathFactory) -> None:
    with serving(home=tmp_path_factory.mktemp("home"), environment=KEY) as untold:
        # On a slow machine the first of a minute are forgotten before there are too many.
        told = statuses(untold, 2000)
    assert set(told) == {401, 429} and len(told) > A_MINUTE


def test_but_of_a_proxy_that_is_trusted(tmp_path_factory: pytest.TempPathFactory) -> None:
    home = tmp_path_factory.mktemp("home")
    with serving("--trusted-proxy", "127.0.0.0/8", home=home, environment=KEY) as told:
        assert statuses(told, A_MINUTE + 10) == [401] * (A_MINUTE + 10)


def test_a_body_that_is_refused_was_counted(tmp_path_factory: pytest.TempPathFactory) -> None:
    with serving(home=tmp_path_factory.mktemp("home"), environment=KEY) as running:
        told: list[int] = []
        while len(told) < 2000 and 429 not in told:
            told.append(call(running, "POST", "/auth/login", ["no", "object"])[0])
    assert set(told) == {422, 429} and len(told) > A_MINUTE


def test_log_ins_that_wait_for_a_hash_are_bounded() -> None:
    """Each takes memory and a tenth of a second: without a bound, the last of a thousand waits for minutes."""

    async def crowd() -> list[object]:
        guards, go = Guards(ServerSettings(host="127.0.0.1")), threading.Event()
        waiting = [asyncio.create_task(guards.hashing(go.wait)) for _ in range(40)]
        await asyncio.sleep(0.1)
        refused = [one.exception() for one in waiting if one.done()]
        go.set()
        await asyncio.wait(waiting)
        assert await guards.hashing(lambda: 3) == 3
        return refused

    refused = asyncio.run(crowd())
    assert len(refused) == 40 - HASHES_AT_ONCE - HASHES_WAITING
    assert all(isinstance(one, RateLimitError) and one.retry_after for one in refused)


@pytest.mark.parametrize("proxy", ["", "*", "proxy.example.org", "10.0.0.1/8", 7])
def test_a_trusted_proxy_is_an_address_or_a_network(proxy: object) -> None:
    with pytest.raises(ValidationError, match="trusted proxy is an address"):
        ServerSettings(trusted_proxies=(proxy,))  # type: ignore[arg-type]
