"""One sender with far more to ask than all the others, over real sockets."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from contextlib import closing

import pytest
from server_calls import ENDLESS, PROMPT, call, until
from server_process import ServerProcess, serving

pytestmark = [pytest.mark.ci, pytest.mark.slow]

KEY = "a-key-of-the-operator"
QUOTA = 100_000


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with serving(
        *("--max-batch", "4", "--account-tokens-per-minute", str(QUOTA), "--trusted-proxy", "127.0.0.0/8"),
        home=tmp_path_factory.mktemp("home"),
        environment={"MECHANEX_SERVER_KEY": KEY},
    ) as running:
        yield running


def account(server: ServerProcess, email: str) -> dict[str, str]:
    """The headers of a new account."""
    login = {"email": email, "password": "wrong donkey cell paperclip"}
    status, _, told = call(server, "POST", "/auth/signup", login, x_api_key=KEY)
    assert status == 200, told
    return {"x-api-key": json.loads(told)["session"]["access_token"]}


def address(text: str) -> dict[str, str]:
    """The headers of someone with the server's key, at an address."""
    return {"x-api-key": KEY, "x-forwarded-for": text}


@pytest.mark.parametrize("kind", ["accounts", "addresses"])
def test_a_sender_with_hundreds_of_answers_holds_no_other_up(server: ServerProcess, kind: str) -> None:
    if kind == "accounts":
        many, few = account(server, "many@example.org"), account(server, "few@example.org")
    else:
        many, few = address("203.0.113.1"), address("203.0.113.2")
    long = ENDLESS | {"n": 64, "max_tokens": 200, "temperature": 1, "seed": 3}
    with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=300)) as waiting:
        waiting.request(
            "POST", "/v1/completions", json.dumps(long), {"Content-Type": "application/json", **many}
        )
        until(lambda: waiting_answers(server) > 50)
        status, headers, told = call(
            server, "POST", "/v1/completions", {"prompt": PROMPT, "max_tokens": 5}, **few
        )
        assert status == 200, told
        assert waiting_answers(server) > 30, "the others were answered first"
        assert QUOTA - 100 < int(headers["x-ratelimit-remaining-tokens"]) < QUOTA
        assert headers["x-ratelimit-limit-tokens"] == str(QUOTA)


def waiting_answers(server: ServerProcess) -> float:
    told = call(server, "GET", "/metrics", x_api_key=KEY)[2].decode()
    found = [line.split()[1] for line in told.splitlines() if line.startswith("mechanex_waiting_requests ")]
    return float(found[0])


def test_used_up_tokens_are_a_429_that_says_when(server: ServerProcess) -> None:
    spender = account(server, "spender@example.org")
    status = 200
    while status == 200:
        body = {"prompt": [[7] * 500] * 100, "max_tokens": 1}
        status, headers, told = call(server, "POST", "/v1/completions", body, **spender)
    assert status == 429 and b"tokens that this account has in a minute" in told
    assert int(headers["retry-after"]) >= 1 and headers["x-ratelimit-remaining-tokens"] == "0"
