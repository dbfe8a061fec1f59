"""What the server's database and files survive: kill -9 while it writes, a full disk, files that may not grow."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path
from typing import Any

import pytest
from server_process import serving
from sqlalchemy import select

from mechanex.server.accounts.store import Store, open_store
from mechanex.server.library.schema import vectors
from mechanex.server.settings import ServerSettings

pytestmark = [
    pytest.mark.ci,
    pytest.mark.slow,
    pytest.mark.skipif(os.name != "posix", reason="signals and limits of POSIX"),
]

EXAMPLES = {
    "prompts": ["The man said", "The woman said"],
    "positive_answers": [" he was happy", " she was glad"],
    "negative_answers": [" he was angry", " she was sad"],
}

# Writes as fast as it can in four threads, and prints what was acknowledged; arguments: a limit of file sizes,
# a database, and what the addresses begin with.
WRITER = textwrap.dedent(
    """
    import json, resource, sys, threading
    import torch
    from argon2 import PasswordHasher
    from mechanex import SteeringVector
    from mechanex.errors import MechanexError
    from mechanex.server.accounts.passwords import Passwords
    from mechanex.server.settings import ServerSettings
    from mechanex.server.accounts.store import open_store

    limit = int(sys.argv[1])
    store = open_store(
        ServerSettings(database=sys.argv[2] or None),
        passwords=Passwords(PasswordHasher(time_cost=1, memory_cost=8, parallelism=1))
    )
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    printing = threading.Lock()
    failed = threading.Event()

    def say(**what):
        with printing:
            print(json.dumps(what), flush=True)

    def work(number):
        count = 0
        try:
            while not failed.is_set():
                count += 1
                email = f"{sys.argv[3]}user{number}.{count}@example.org"
                account, session = store.users.sign_up(email, "correct horse")
                say(account=account.id, email=email, refresh=session.refresh_token)
                say(account=account.id, key=store.keys.create(account.id, "key")[0])
                vector = SteeringVector({0: torch.full((64,), float(count))})
                made = store.library.add_behavior(account.id, "kind", "d" * 2000, {"prompts": []}, vector)
                say(account=account.id, behavior=made.steering_vector_id, value=float(count))
        except MechanexError as error:
            failed.set()
            say(error=error.message, status=error.status_code)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    # Whoever was there before the disk was full can still be read.
    say(readable=store.users.get(None).id)
    """
)


def written(process: subprocess.Popen[str], lines: int | None) -> list[dict[str, Any]]:
    """What a writer acknowledged; killed after so many lines, or all until it ends."""
    assert process.stdout is not None
    acknowledged = []
    for line in process.stdout:
        if line.endswith("\n"):  # the last one may be cut
            acknowledged.append(json.loads(line))
        if len(acknowledged) == lines:
            process.send_signal(signal.SIGKILL)
    process.wait(300)
    return acknowledged


def writer(home: Path, limit: int = 0, database: str | None = None, begin: str = "") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(limit), database or "", begin],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "MECHANEX_HOME": str(home)},
    )


def check_all_there(store: Store, acknowledged: list[dict[str, Any]]) -> None:
    for entry in acknowledged:
        if "email" in entry:
            assert store.users.get(entry["account"]).email == entry["email"]
            assert (
                store.sessions.account_for(store.sessions.refresh(entry["refresh"]).access_token)
                == entry["account"]
            )
        elif "key" in entry:
            holder = store.keys.opened_by(entry["key"])
            assert holder is not None and holder.account_id == entry["account"]
        elif "behavior" in entry:
            assert store.library.behavior_vector_id(entry["account"], "kind") == entry["behavior"]
            vector = store.library.vector(entry["account"], entry["behavior"])
            assert vector is not None and float(vector[0][0]) == entry["value"]


def check_sound(home: Path) -> None:
    with contextlib.closing(sqlite3.connect(home / "server.sqlite")) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []


@pytest.fixture
def store_after(mechanex_home: Path) -> Iterator[Any]:
    stores: list[Store] = []

    def reopen(database: str | None = None) -> Store:
        stores.append(open_store(ServerSettings(database=database)))
        return stores[-1]

    yield reopen
    for store in stores:
        store.database.close()


@pytest.mark.parametrize("kills", [5, pytest.param(50, marks=pytest.mark.long)])
def test_kill_9_while_writing_loses_nothing_that_was_acknowledged_and_leaves_no_files(
    mechanex_home: Path, store_after: Any, database: str | None, kills: int
) -> None:
    for number in range(kills):
        lines = 3 + 37 * number % 150
        process = writer(mechanex_home, database=database, begin=f"{number}.")
        acknowledged = written(process, lines)
        assert process.returncode == -signal.SIGKILL and len(acknowledged) >= lines
        if database is None:
            check_sound(mechanex_home)
        store = store_after(database)
        check_all_there(store, acknowledged)
        with store.database.read() as connection:
            rows = {f"{row_id}.safetensors" for row_id in connection.scalars(select(vectors.c.id))}
        assert {path.name for path in (mechanex_home / "server" / "vectors").glob("*")} == rows
        store.close()


def test_files_that_may_not_grow_are_an_error_and_nothing_acknowledged_is_lost(
    mechanex_home: Path, store_after: Any
) -> None:
    process = writer(mechanex_home, limit=1_200_000)
    acknowledged = written(process, None)
    assert process.returncode == 0
    errors = [entry for entry in acknowledged if "error" in entry]
    assert errors and all(entry["status"] in (500, 507) for entry in errors)
    assert all("disk" in entry["error"] or "File too large" in entry["error"] for entry in errors)
    assert acknowledged[-1] == {"readable": "local"}
    assert len(acknowledged) > 20
    check_sound(mechanex_home)
    check_all_there(store_after(), acknowledged)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, 1.5 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("mounting a small file system takes root")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_is_an_error_with_a_reason_and_heals(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch, store_after: Any
) -> None:
    monkeypatch.setenv("MECHANEX_HOME", str(small_disk))
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"x" * 800_000)
    process = writer(small_disk)
    acknowledged = written(process, None)
    assert process.returncode == 0 and acknowledged[-1] == {"readable": "local"}
    errors = [entry for entry in acknowledged if "error" in entry]
    assert errors and {entry["status"] for entry in errors} == {507}
    assert all("full" in entry["error"] or "No space left" in entry["error"] for entry in errors)
    ballast.unlink()
    check_sound(small_disk)
    store = store_after()
    check_all_there(store, acknowledged)
    store.users.sign_up("late@example.org", "correct horse")
    vectors = {path.stem for path in (small_disk / "server" / "vectors").iterdir()}
    assert vectors == {entry["behavior"] for entry in acknowledged if "behavior" in entry}


def call(url: str, body: dict[str, Any] | None = None, token: str | None = None) -> Any:
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {token}"} if token else {})
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=300) as answer:
        return json.loads(answer.read())


def test_kill_9_of_a_server_loses_nothing_that_it_answered(mechanex_home: Path, database: str | None) -> None:
    arguments = () if database is None else ("--database", database)
    keys: dict[str, str] = {}
    behaviors: dict[str, tuple[str, str]] = {}
    enough = threading.Event()

    def work(url: str, number: int) -> None:
        email = f"user{number}@example.org"
        account = {"email": email, "password": "correct horse"}
        token = call(f"{url}/auth/signup", account)["session"]["access_token"]
        count = 0
        try:
            while True:
                count += 1
                key = call(f"{url}/auth/api-keys", {"name": "key"}, token)["key"]
                keys[key] = email
                name = f"behavior {number}.{count}"
                made = call(f"{url}/behaviors/create", EXAMPLES | {"behavior_name": name}, key)
                behaviors[name] = (key, made["steering_vector_id"])
                if len(behaviors) >= 20:
                    enough.set()
        except urllib.error.HTTPError:
            raise
        except (OSError, HTTPException, ValueError):
            assert enough.is_set()  # the server is killed while some of this is on its way

    with serving(*arguments, home=mechanex_home) as server, ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(work, server.url, number) for number in range(4)]
        assert enough.wait(300)
        assert server.stop(signal.SIGKILL) == -signal.SIGKILL
        for client in clients:
            client.result()
    if database is None:
        check_sound(mechanex_home)
    with serving(*arguments, home=mechanex_home) as server:
        for key, email in keys.items():
            assert call(f"{server.url}/auth/whoami", token=key)["email"] == email
        for name, (key, vector_id) in behaviors.items():
            listed = {one["behavior_name"]: one for one in call(f"{server.url}/behaviors", token=key)}
            assert listed[name]["steering_vector_id"] == vector_id
        body = {"prompt": "The", "max_tokens": 1, "steering_vector_id": vector_id, "steering_strength": 1}
        assert call(f"{server.url}/generate", body, key)["output"].startswith("The")
        call(f"{server.url}/auth/login", {"email": email, "password": "correct horse"})


def test_a_server_on_a_full_disk_says_so_and_goes_on(small_disk: Path, mechanex_home: Path) -> None:
    account = {"email": "ann@example.org", "password": "correct horse"}
    with serving("--database", str(small_disk / "server.sqlite"), home=mechanex_home) as server:
        token = call(f"{server.url}/auth/signup", account)["session"]["access_token"]
        ballast = small_disk / "ballast"
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(b"x" * 4096)
        with pytest.raises(urllib.error.HTTPError) as error:
            call(f"{server.url}/auth/signup", account | {"email": "bob@example.org"})
        assert error.value.code == 507
        assert "disk is full" in json.loads(error.value.read())["detail"]
        assert call(f"{server.url}/auth/whoami", token=token)["email"] == account["email"]
        assert call(f"{server.url}/generate", {"prompt": "The", "max_tokens": 1}, token)["output"]
        ballast.unlink()
        call(f"{server.url}/auth/signup", account | {"email": "bob@example.org"})
