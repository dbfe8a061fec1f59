"""A database that someone else holds: those who have to write to it wait, and nobody else."""

from __future__ import annotations

import contextlib
import http.client
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from server_calls import call
from server_process import ServerProcess, serving

from mechanex.server.accounts.passwords import Passwords
from mechanex.server.accounts.store import Store, open_store
from mechanex.server.settings import ServerSettings

KEY = "a-key-of-the-operator"
LOGIN = {"email": "ann@example.org", "password": "wrong donkey cell paperclip"}
WRITERS = 50  # of an address, in a minute, no more than 60 are let in


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """SQLite's one lock for writing, taken by another process."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield
        other.execute("ROLLBACK")


def sent(server: ServerProcess, path: str, body: object, key: str) -> http.client.HTTPConnection:
    """A request whose answer isn't waited for."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=45)
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    connection.request("POST", path, json.dumps(body), headers)
    return connection


@pytest.mark.ci
@pytest.mark.slow
def test_text_does_not_wait_for_those_who_write(tmp_path: Path) -> None:
    # Long enough to be encoded in a thread.
    body = {"prompt": "Anna went to the market. " * 50, "max_tokens": 2, "temperature": 0}
    with serving(home=tmp_path, environment={"MECHANEX_SERVER_KEY": KEY}) as server:
        status, _, told = call(server, "POST", "/auth/signup", LOGIN, x_api_key=KEY)
        assert status == 200, told
        token = json.loads(told)["session"]["access_token"]
        _, _, told = call(server, "POST", "/auth/api-keys", {}, authorization=f"Bearer {token}")
        account = json.loads(told)["key"]
        with held(tmp_path / "server.sqlite"), contextlib.ExitStack() as waiting:
            for _ in range(WRITERS):
                writer = sent(server, "/auth/api-keys", {}, token)
                waiting.callback(writer.close)
            for key in (KEY, account, token):
                asked = sent(server, "/v1/completions", body, key)
                waiting.callback(asked.close)
                answer = asked.getresponse()
                assert answer.status == 200, answer.read()


@pytest.fixture
def store(mechanex_home: Path) -> Iterator[Store]:
    opened = open_store(ServerSettings(host="127.0.0.1"), passwords=Passwords())
    yield opened
    opened.close()


def test_the_last_use_of_a_key_is_noted_when_it_can_be(store: Store, mechanex_home: Path) -> None:
    path = mechanex_home / "server.sqlite"
    ann, _ = store.users.sign_up(LOGIN["email"], LOGIN["password"])
    key, _ = store.keys.create(ann.id, "laptop")
    with held(path):
        holder = store.keys.opened_by(key)
        assert holder is not None and holder.account_id == ann.id
        assert store.keys.all(ann.id)[0].last_used is not None
    store.close()
    again = open_store(ServerSettings(host="127.0.0.1"))
    assert again.keys.all(ann.id)[0].last_used is not None
    again.close()
