"""The server's accounts, keys and vectors: what is kept, what isn't, who may see it, and what a bad disk says."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from argon2 import PasswordHasher
from postgres_server import Postgres
from sqlalchemy import create_engine, func, select
from sqlalchemy.dialects import mysql
from sqlalchemy.schema import CreateTable

from mechanex import AuthenticationError, NotFoundError, RateLimitError, SteeringVector, ValidationError
from mechanex.server.accounts.api_keys import KeyExpiredError, KeyHolder
from mechanex.server.accounts.passwords import Passwords
from mechanex.server.accounts.sessions import GRACE, Session
from mechanex.server.accounts.store import StorageError, Store, open_store
from mechanex.server.http.limits import RateLimit, client_address
from mechanex.server.library.database import Database
from mechanex.server.library.schema import (
    OLDEST_VERSION,
    VERSION,
    VERSION_TABLE,
    behaviors,
    metadata,
    vectors,
)
from mechanex.server.settings import ServerSettings

pytestmark = pytest.mark.slow

DAY = 86_400.0
CHEAP = PasswordHasher(time_cost=1, memory_cost=8, parallelism=1)
VECTOR = SteeringVector({2: torch.tensor([1.0, -2.0, 0.5])}, model="m", method="caa")
EXAMPLES = {"prompts": ["a"], "positive_answers": ["b"], "negative_answers": ["c"]}


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now

    def pass_by(self, seconds: float) -> None:
        self.now += seconds


def opened(database: str | Path | None = None, clock: Callable[[], float] = time.time) -> Store:
    settings = ServerSettings(database=None if database is None else str(database))
    return open_store(settings, clock=clock, passwords=Passwords(CHEAP))


@pytest.fixture
def database(request: pytest.FixtureRequest) -> str | None:
    """The URL of an empty database; None for SQLite in its usual place, which most tests take."""
    if getattr(request, "param", "sqlite") == "sqlite":
        return None
    server: Postgres = request.getfixturevalue("postgresql")
    return server.new_database()


on_each_database = pytest.mark.parametrize("database", ["sqlite", "postgresql"], indirect=True)
"""For what databases do in their own way: crashes, races, the schema and what a row comes back as."""


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(database: str | None, clock: Clock) -> Iterator[Store]:
    store = opened(database, clock)
    yield store
    store.close()


@pytest.fixture
def sqlite_store(clock: Clock) -> Iterator[Store]:
    store = opened(clock=clock)
    yield store
    store.close()


# Accounts


@on_each_database
def test_sign_up_log_in_and_again_after_a_restart(store: Store, database: str | None, clock: Clock) -> None:
    account, session = store.users.sign_up("Ann@Example.org ", "correct horse")
    assert account.email == "ann@example.org" and account.created_at == clock.now
    assert store.sessions.account_for(session.access_token) == account.id
    store.close()
    again = opened(database, clock)
    assert again.sessions.account_for(session.access_token) == account.id
    later = again.users.log_in("ann@example.ORG", "correct horse")
    assert again.sessions.account_for(later.access_token) == account.id
    assert again.users.get(account.id) == account
    again.close()


def test_a_wrong_password_and_an_unknown_address_are_one_error(store: Store) -> None:
    store.users.sign_up("ann@example.org", "correct horse")
    told = []
    for email, password in (
        ("ann@example.org", "wrong horse"),
        ("bob@example.org", "correct horse"),
        ("no address", "correct horse"),
        ("ann@example.org", "correct horse" + "x" * 100_000),
        ("", ""),
        ("\ud800@example.org", "\ud800"),
    ):
        with pytest.raises(AuthenticationError) as error:
            store.users.log_in(email, password)
        told.append(str(error.value))
    assert len(set(told)) == 1 and told[0].startswith("[401]")


class _Counting(PasswordHasher):
    """Counts how often it does the work that takes long."""

    checks = 0

    def verify(self, *arguments: Any) -> Any:
        self.checks += 1
        return super().verify(*arguments)


def test_an_unknown_address_takes_as_long_as_a_wrong_password(clock: Clock) -> None:
    """As much work: without it, an unknown address would be told fifty times sooner."""
    hasher = _Counting(time_cost=1, memory_cost=64, parallelism=1)
    store = open_store(ServerSettings(), clock=clock, passwords=Passwords(hasher))
    store.users.sign_up("ann@example.org", "correct horse")
    for email in ("ann@example.org", "bob@example.org"):
        before = hasher.checks
        with pytest.raises(AuthenticationError):
            store.users.log_in(email, "wrong horse")
        assert hasher.checks == before + 1
    store.close()


@pytest.mark.parametrize(
    "email",
    ["", "ann", "ann@", "@example.org", "a b@example.org", "ann@@example.org", "ann@.org", "ann@example.org\n.x",
     "ann@example..org", "x" * 65 + "@example.org", "ann@" + "example." * 40 + "org",
     "a\x00@example.org", "\ud800@b.c"],
)  # fmt: skip
def test_sign_up_takes_email_addresses_only(store: Store, email: str) -> None:
    with pytest.raises(ValidationError, match="is no email address: write"):
        store.users.sign_up(email, "correct horse")


def test_sign_up_says_what_else_is_wrong(store: Store) -> None:
    for password in ("short", "x" * 1025):
        with pytest.raises(ValidationError, match=f"8 to 1024 characters; this one has {len(password)}"):
            store.users.sign_up("ann@example.org", password)
    store.users.sign_up("ann@example.org", hashlib.sha512(b"long").hexdigest() * 8)
    with pytest.raises(ValidationError, match="has an account already"):
        store.users.sign_up("ANN@example.org", "correct horse")


@pytest.mark.parametrize(
    "password, why",
    [
        ("ann@example.org", "is the email address"),
        (" ANN@Example.org", "is the email address"),
        ("example.org", "a part of it"),
        ("aaaaaaaaaaaa", "one character again and again"),
        ("\U0001f980" * 8, "one character again and again"),
        ("password1", "very common password"),
        ("abcabcabcabc", "Repeats"),
        ("e\u0301e\u0301e\u0301e\u0301", "this one has 4"),
    ],
)
def test_a_password_that_is_soon_guessed_is_refused(store: Store, password: str, why: str) -> None:
    with pytest.raises(ValidationError, match=why) as error:
        store.users.sign_up("ann@example.org", password)
    assert password not in str(error.value)
    ann, _ = store.users.sign_up("ann@example.org", "correct horse")
    with pytest.raises(ValidationError, match=why):
        store.users.change_password(ann.id, "correct horse", password)


def test_a_password_is_its_text_on_any_keyboard(store: Store) -> None:
    composed, decomposed = "sch\u00f6nes wetter", "scho\u0308nes wetter"
    store.users.sign_up("ann@example.org", decomposed)
    assert store.users.log_in("ann@example.org", composed)
    assert store.users.log_in("ann@example.org", decomposed)
    # A hash of an earlier version is of what was typed.
    with store.database.write() as connection:
        old = CHEAP.hash(decomposed.encode())
        connection.exec_driver_sql(
            f"UPDATE mechanex_users SET password_hash = '{old}' WHERE email IS NOT NULL"
        )
    assert store.users.log_in("ann@example.org", decomposed)


def test_a_form_of_a_password_costs_the_same_with_an_account_and_without(clock: Clock) -> None:
    hasher = _Counting(time_cost=1, memory_cost=64, parallelism=1)
    store = open_store(ServerSettings(), clock=clock, passwords=Passwords(hasher))
    store.users.sign_up("ann@example.org", "correct horse")
    counts = []
    for email in ("ann@example.org", "bob@example.org"):
        before = hasher.checks
        with pytest.raises(AuthenticationError):
            store.users.log_in(email, "scho\u0308nes wetter")
        counts.append(hasher.checks - before)
    assert counts[0] == counts[1]
    store.close()


def test_a_password_moves_to_new_costs_at_the_next_log_in(sqlite_store: Store, clock: Clock) -> None:
    sqlite_store.users.sign_up("ann@example.org", "correct horse")
    sqlite_store.close()
    dearer = Passwords(PasswordHasher(time_cost=2, memory_cost=16, parallelism=1))
    again = open_store(ServerSettings(), clock=clock, passwords=dearer)
    again.users.log_in("ann@example.org", "correct horse")
    again.close()
    assert b"$m=16,t=2,p=1$" in database_bytes()
    last = open_store(ServerSettings(), clock=clock, passwords=dearer)
    last.users.log_in("ann@example.org", "correct horse")
    last.close()


# Access tokens


def test_an_access_token_ends_after_its_minutes(store: Store, clock: Clock) -> None:
    account, session = store.users.sign_up("ann@example.org", "correct horse")
    clock.pass_by(15 * 60 - 1)
    assert store.sessions.account_for(session.access_token) == account.id
    clock.pass_by(1)
    with pytest.raises(AuthenticationError, match=r"\[401\] The access token has expired: .* /auth/refresh"):
        store.sessions.account_for(session.access_token)


def test_another_text_is_no_access_token(store: Store) -> None:
    _, session = store.users.sign_up("ann@example.org", "correct horse")
    token = session.access_token
    for other in (
        "",
        "sk-anything",
        "a.b.c",
        "mxa-",
        token[:-1],
        token + "A",
        token[4:],
        f" {token}",
        token.swapcase(),
        session.refresh_token,
        "mxa-" + session.refresh_token[4:],
        "mxa-é.ü.\x00",
        "mxa-\ud800",
    ):
        assert store.sessions.account_for(other) is None, other


def test_an_access_token_lives_its_time_whatever_comes_after_it(store: Store, clock: Clock) -> None:
    account, session = store.users.sign_up("ann@example.org", "correct horse")
    newer = store.sessions.refresh(session.refresh_token)
    assert newer.access_token != session.access_token
    for token in (session.access_token, newer.access_token):
        assert store.sessions.account_for(token) == account.id
    clock.pass_by(15 * 60)
    for token in (session.access_token, newer.access_token):
        with pytest.raises(AuthenticationError, match="has expired"):
            store.sessions.account_for(token)


# Refresh tokens


@on_each_database
def test_refresh_tokens_rotate(store: Store, clock: Clock) -> None:
    account, session = store.users.sign_up("ann@example.org", "correct horse")
    seen = {session.refresh_token}
    for _ in range(4):
        clock.pass_by(29 * DAY)
        session = store.sessions.refresh(session.refresh_token)
        assert store.sessions.account_for(session.access_token) == account.id
        seen.add(session.refresh_token)
    assert len(seen) == 5


def test_a_refresh_token_that_comes_twice_ends_its_session_and_no_other(store: Store) -> None:
    account, stolen = store.users.sign_up("ann@example.org", "correct horse")
    elsewhere = store.users.log_in("ann@example.org", "correct horse")
    newer = store.sessions.refresh(stolen.refresh_token)
    newest = store.sessions.refresh(newer.refresh_token)
    with pytest.raises(AuthenticationError, match="used before: log in again"):
        store.sessions.refresh(stolen.refresh_token)
    with pytest.raises(AuthenticationError):
        store.sessions.refresh(newest.refresh_token)
    for session in (stolen, newer, newest):
        with pytest.raises(AuthenticationError, match="session has ended"):
            store.sessions.account_for(session.access_token)
    assert store.sessions.account_for(elsewhere.access_token) == account.id
    assert store.sessions.refresh(elsewhere.refresh_token)


@on_each_database
def test_a_lost_answer_to_a_refresh_costs_nobody_the_session(store: Store, clock: Clock) -> None:
    ann, session = store.users.sign_up("ann@example.org", "correct horse")
    lost = store.sessions.refresh(session.refresh_token)
    clock.pass_by(GRACE)
    again = store.sessions.refresh(session.refresh_token)
    assert store.sessions.account_for(again.access_token) == ann.id
    newer = store.sessions.refresh(again.refresh_token)  # this is the one that arrived
    assert store.sessions.account_for(newer.access_token) == ann.id
    # whoever has the other one isn't its owner
    with pytest.raises(AuthenticationError, match="used before"):
        store.sessions.refresh(lost.refresh_token)
    with pytest.raises(AuthenticationError, match="session has ended"):
        store.sessions.account_for(newer.access_token)


@pytest.mark.parametrize("late", ["after the grace", "after its pair went on"])
def test_a_refresh_token_that_comes_too_late_ends_its_session(store: Store, clock: Clock, late: str) -> None:
    _, session = store.users.sign_up("ann@example.org", "correct horse")
    newest = store.sessions.refresh(session.refresh_token)
    if late == "after the grace":
        clock.pass_by(GRACE + 1)
    else:
        newest = store.sessions.refresh(newest.refresh_token)
    with pytest.raises(AuthenticationError, match="used before"):
        store.sessions.refresh(session.refresh_token)
    with pytest.raises(AuthenticationError, match="session has ended"):
        store.sessions.account_for(newest.access_token)


def test_a_clock_that_was_wrong_for_a_while_ends_no_session(store: Store, clock: Clock) -> None:
    _, session = store.users.sign_up("ann@example.org", "correct horse")
    right, clock.now = clock.now, 0.0
    session = store.sessions.refresh(session.refresh_token)
    clock.now = right
    assert store.sessions.refresh(session.refresh_token)


def test_a_refresh_token_ends_after_its_days(store: Store, clock: Clock) -> None:
    _, session = store.users.sign_up("ann@example.org", "correct horse")
    clock.pass_by(30 * DAY)
    for token in (session.refresh_token, session.access_token, "", "mxr-unknown", "\ud800"):
        with pytest.raises(AuthenticationError, match=r"\[401\]"):
            store.sessions.refresh(token)


# API keys


@on_each_database
def test_a_key_is_shown_once_and_works_until_it_is_deleted(store: Store, clock: Clock) -> None:
    ann, _ = store.users.sign_up("ann@example.org", "correct horse")
    bob, _ = store.users.sign_up("bob@example.org", "correct horse")
    key, _ = store.keys.create(ann.id, "laptop")
    clock.pass_by(1)
    store.keys.create(ann.id, "laptop")
    (listed, _) = store.keys.all(ann.id)
    assert listed.name == "laptop" and listed.last_used is None
    assert listed.key == f"{key[:8]}…"
    assert store.keys.opened_by(key) == KeyHolder(ann.id, None)
    assert store.keys.all(ann.id)[0].last_used == clock.now
    assert store.keys.all(bob.id) == []
    for account, key_id in ((bob.id, listed.id), (ann.id, "f" * 32), (ann.id, "\x00"), (ann.id, "\ud800")):
        with pytest.raises(NotFoundError, match="no API key of this account"):
            store.keys.delete(account, key_id)
    assert store.keys.opened_by(key) == KeyHolder(ann.id, None)
    store.keys.delete(ann.id, listed.id)
    assert store.keys.opened_by(key) is None
    for other in ("", "mx-", key[:-1], key + "x", key.upper(), f" {key}", "mx-\ud800"):
        assert store.keys.opened_by(other) is None


@on_each_database
def test_a_key_may_do_what_it_was_made_for_until_it_ends(store: Store, clock: Clock) -> None:
    ann, _ = store.users.sign_up("ann@example.org", "correct horse")
    key, made = store.keys.create(ann.id, "robot", scopes=["generate", "vectors", "generate"], lifetime=DAY)
    assert (made.scopes, made.expires_at) == (("generate", "vectors"), clock.now + DAY)
    assert store.keys.all(ann.id) == [made] and key.startswith(made.key[:-1])
    clock.pass_by(DAY - 1)
    assert store.keys.opened_by(key) == KeyHolder(ann.id, ("generate", "vectors"))
    clock.pass_by(1)
    with pytest.raises(KeyExpiredError, match="has expired: log in and make another"):
        store.keys.opened_by(key)


def test_the_last_use_is_noted_once_a_minute(store: Store, clock: Clock) -> None:
    ann, _ = store.users.sign_up("ann@example.org", "correct horse")
    key, _ = store.keys.create(ann.id, "laptop")
    first = clock.now
    for step, noted in ((0, first), (59, first), (1, first + 60)):
        clock.pass_by(step)
        store.keys.opened_by(key)
        assert store.keys.all(ann.id)[0].last_used == noted


def test_the_database_holds_no_secret_that_opens_anything(sqlite_store: Store, mechanex_home: Path) -> None:
    ann, session = sqlite_store.users.sign_up("ann@example.org", "correct horse battery")
    key, _ = sqlite_store.keys.create(ann.id, "laptop")
    newer = sqlite_store.sessions.refresh(session.refresh_token)
    held = b"".join(path.read_bytes() for path in mechanex_home.glob("server.sqlite*"))
    assert b"ann@example.org" in held and b"$argon2id$" in held
    for text in (
        "correct horse",
        key[8:],
        session.refresh_token[4:],
        newer.refresh_token[4:],
        session.access_token[4:],
        newer.access_token[4:],
    ):
        assert text.encode() not in held


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX permissions")
def test_only_the_owner_can_read_the_files(sqlite_store: Store, mechanex_home: Path) -> None:
    sqlite_store.users.sign_up("ann@example.org", "correct horse")
    files = [*mechanex_home.glob("server.sqlite*")]
    assert len(files) >= 2  # the log of SQLite too
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}


# Vectors and behaviors


def test_vectors_and_behaviors_belong_to_their_account(store: Store) -> None:
    ann, _ = store.users.sign_up("ann@example.org", "correct horse")
    bob, _ = store.users.sign_up("bob@example.org", "correct horse")
    for owner in (ann.id, None):
        vector_id = store.library.add_vector(owner, VECTOR)
        made = store.library.add_behavior(owner, "kind", "is kind", EXAMPLES, vector_id)
        assert store.library.behavior_vector_id(owner, "kind") == vector_id
        assert made.steering_vector_id == vector_id
        assert store.library.behaviors(owner) == [made]
        for other in {ann.id, bob.id, None} - {owner}:
            assert store.library.vector(other, vector_id) is None
            with pytest.raises(NotFoundError, match="no steering vector has the id"):
                store.library.add_behavior(other, "mine", "", EXAMPLES, vector_id)
            assert store.library.behavior_vector_id(other, "mine") is None
        assert store.library.vector(owner, vector_id) == VECTOR
    assert store.library.behavior_vector_id(bob.id, "kind") is None and store.library.behaviors(bob.id) == []
    for unknown in ("", "f" * 32, "../secret", "\x00", "\ud800"):
        assert store.library.vector(ann.id, unknown) is None


@on_each_database
def test_what_was_kept_is_there_after_a_restart(store: Store, database: str | None, clock: Clock) -> None:
    ann, _ = store.users.sign_up("ann@example.org", "correct horse")
    vector_id = store.library.add_vector(ann.id, VECTOR)
    made = store.library.add_behavior(ann.id, "kind", "", EXAMPLES | {"prompts": [[1, 2]]}, 2 * VECTOR)
    store.users.set_model(ann.id, "mx-tiny")
    store.close()
    again = opened(database, clock)
    assert again.library.vector(ann.id, vector_id) == VECTOR
    assert again.library.behaviors(ann.id) == [made] and made.n_examples == 1
    with again.database.read() as connection:
        assert json.loads(connection.scalar(select(behaviors.c.examples))) == EXAMPLES | {"prompts": [[1, 2]]}
    assert again.library.vector(ann.id, made.steering_vector_id) == 2 * VECTOR
    assert again.users.get(ann.id).model_name == "mx-tiny"
    again.close()


@on_each_database
def test_a_behaviors_name_is_taken_once_per_account(store: Store, mechanex_home: Path) -> None:
    ann, _ = store.users.sign_up("ann@example.org", "correct horse")
    made = store.library.add_behavior(ann.id, "kind", "", EXAMPLES, VECTOR)
    files = set((mechanex_home / "server" / "vectors").iterdir())
    for vector in (VECTOR, made.steering_vector_id):
        with pytest.raises(ValidationError, match="a behavior named 'kind' already"):
            store.library.add_behavior(ann.id, "kind", "", EXAMPLES, vector)
    assert set((mechanex_home / "server" / "vectors").iterdir()) == files
    assert store.library.behaviors(ann.id) == [made]
    store.library.add_behavior(None, "kind", "", EXAMPLES, VECTOR)


@pytest.mark.parametrize("harm, said", [("delete", "missing"), ("garble", "damaged"), ("folder", "damaged")])
def test_an_unreadable_vector_file_is_an_error_with_a_reason(
    store: Store, database: str | None, clock: Clock, mechanex_home: Path, harm: str, said: str
) -> None:
    vector_id = store.library.add_vector(None, VECTOR)
    whole = store.library.add_vector(None, VECTOR)
    store.close()
    file = mechanex_home / "server" / "vectors" / f"{vector_id}.safetensors"
    if harm == "garble":
        file.write_bytes(b"\xff" * 40)
    else:
        file.unlink()
    if harm == "folder":
        file.mkdir()
    again = opened(database, clock)
    with pytest.raises(
        StorageError, match=f"{vector_id}' is {said} on the server: make the vector again"
    ) as error:
        again.library.vector(None, vector_id)
    assert error.value.status_code == 500 and str(mechanex_home) not in str(error.value)
    assert again.library.vector(None, whole) == VECTOR
    again.library.delete_vector(None, vector_id)  # also where its file can't go
    assert [kept.steering_vector_id for kept in again.library.vectors(None)] == [whole]
    assert again.library.vector(None, vector_id) is None
    again.close()


@on_each_database
def test_vectors_and_behaviors_can_be_deleted_by_their_account_alone(
    store: Store, mechanex_home: Path
) -> None:
    ann, _ = store.users.sign_up("ann@example.org", "correct horse")
    bob, _ = store.users.sign_up("bob@example.org", "correct horse")
    vector_id = store.library.add_vector(ann.id, VECTOR)
    store.library.add_behavior(ann.id, "kind", "", EXAMPLES, vector_id)
    store.library.add_behavior(ann.id, "good", "", EXAMPLES, vector_id)
    (listed,) = store.library.vectors(ann.id)
    assert (listed.steering_vector_id, listed.behavior_names) == (vector_id, ("good", "kind"))
    assert store.library.vectors(bob.id) == store.library.vectors(None) == []
    for other in (bob.id, None):
        with pytest.raises(NotFoundError):
            store.library.delete_vector(other, vector_id)
        with pytest.raises(NotFoundError):
            store.library.delete_behavior(other, "kind")
    with pytest.raises(ValidationError, match="is that of the behavior 'good', 'kind': delete that first"):
        store.library.delete_vector(ann.id, vector_id)
    for name in ("unkind", "", "a\x00b"):
        with pytest.raises(NotFoundError, match="GET /behaviors lists them"):
            store.library.delete_behavior(ann.id, name)
    for name in ("kind", "good"):
        store.library.delete_behavior(ann.id, name)
    assert store.library.behaviors(ann.id) == [] and store.library.vector(ann.id, vector_id) == VECTOR
    file = mechanex_home / "server" / "vectors" / f"{vector_id}.safetensors"
    assert file.exists()
    store.library.delete_vector(ann.id, vector_id)
    assert store.library.vector(ann.id, vector_id) is None and not file.exists()
    with pytest.raises(NotFoundError):
        store.library.delete_vector(ann.id, vector_id)


def test_an_account_keeps_so_many_vectors_and_is_told_how_to_make_room(
    database: str | None, clock: Clock, mechanex_home: Path
) -> None:
    store = open_store(
        ServerSettings(database=database, max_vectors=2), clock=clock, passwords=Passwords(CHEAP)
    )
    ann, _ = store.users.sign_up("ann@example.org", "correct horse")
    first = store.library.add_vector(ann.id, VECTOR)
    store.library.check_room(ann.id)
    store.library.add_behavior(ann.id, "kind", "", EXAMPLES, VECTOR)
    for attempt in (
        lambda: store.library.check_room(ann.id),
        lambda: store.library.add_vector(ann.id, VECTOR),
        lambda: store.library.add_behavior(ann.id, "good", "", EXAMPLES, VECTOR),
    ):
        with pytest.raises(ValidationError, match="keeps 2 steering vectors, and may keep 2: delete one"):
            attempt()
    assert len(list((mechanex_home / "server" / "vectors").iterdir())) == 2
    store.library.add_behavior(ann.id, "good", "", EXAMPLES, first)  # which keeps no other vector
    with pytest.raises(
        ValidationError, match="keeps 2 behaviors, and may keep 2: delete one with DELETE /beh"
    ):
        store.library.add_behavior(ann.id, "more", "", EXAMPLES, first)
    for _ in range(3):
        store.library.add_vector(None, VECTOR)  # the operator's are not counted
    store.library.delete_behavior(ann.id, "good")
    store.library.delete_vector(ann.id, first)
    assert store.library.add_vector(ann.id, VECTOR)
    store.close()


@on_each_database
def test_many_at_once_keep_no_more_than_one_by_one(database: str | None, clock: Clock) -> None:
    store = open_store(
        ServerSettings(database=database, max_vectors=3), clock=clock, passwords=Passwords(CHEAP)
    )
    ann, _ = store.users.sign_up("ann@example.org", "correct horse")
    barrier = threading.Barrier(8)

    def work(_: int) -> bool:
        barrier.wait()
        try:
            store.library.add_vector(ann.id, VECTOR)
        except ValidationError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(work, range(8))) == len(store.library.vectors(ann.id)) == 3
    store.close()


@on_each_database
def test_what_is_deleted_in_the_middle_is_not_there(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    ann, _ = store.users.sign_up("ann@example.org", "correct horse")
    library = store.library
    owns = library._owns

    def owned_until_now(account_id: str | None, vector_id: str) -> bool:
        found = owns(account_id, vector_id)
        monkeypatch.setattr(library, "_owns", owns)
        library.delete_vector(account_id, vector_id)
        return found

    vector_id = library.add_vector(ann.id, VECTOR)
    monkeypatch.setattr(library, "_owns", owned_until_now)
    assert library.vector(ann.id, vector_id) is None
    vector_id = library.add_vector(ann.id, VECTOR)
    monkeypatch.setattr(library, "_owns", owned_until_now)
    with pytest.raises(NotFoundError, match=vector_id):
        library.add_behavior(ann.id, "kind", "", EXAMPLES, vector_id)
    assert library.behaviors(ann.id) == []


# The database


@on_each_database
def test_what_is_read_together_is_of_one_moment(store: Store) -> None:
    ann, _ = store.users.sign_up("ann@example.org", "correct horse")
    vector_id = store.library.add_vector(ann.id, VECTOR)
    reading = Database(str(store.database.url.render_as_string(hide_password=False)))
    kept = select(func.count()).select_from(vectors)
    with reading.read() as connection:
        assert connection.scalar(kept) == 1
        store.library.delete_vector(ann.id, vector_id)
        assert connection.scalar(kept) == 1
    with reading.read() as connection:
        assert connection.scalar(kept) == 0
    reading.close()


@pytest.mark.parametrize("database", ["postgresql"], indirect=True)
def test_the_names_of_a_vector_have_one_order_on_all_databases(store: Store) -> None:
    with store.database.write() as connection:  # what a cluster of another locale has
        connection.exec_driver_sql(
            'ALTER TABLE mechanex_behaviors ALTER behavior_name TYPE varchar(200) COLLATE "en-x-icu"'
        )
    ann, _ = store.users.sign_up("ann@example.org", "correct horse")
    vector_id = store.library.add_vector(ann.id, VECTOR)
    for name in ("b", "a b", "A", "ab", "_", "B"):
        store.library.add_behavior(ann.id, name, "", EXAMPLES, vector_id)
    (kept,) = store.library.vectors(ann.id)
    assert kept.behavior_names == ("A", "B", "_", "a b", "ab", "b")


def test_opening_refuses_what_is_not_ours(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign.sqlite"
    with sqlite3.connect(foreign) as connection:
        connection.execute("CREATE TABLE mechanex_users (id INTEGER)")
    with pytest.raises(StorageError, match="tables named mechanex_users and no version"):
        opened(foreign)
    garbage = tmp_path / "garbage.sqlite"
    garbage.write_bytes(b"not a database, but long enough to be looked at" * 30)
    before = garbage.read_bytes()
    with pytest.raises(StorageError, match="file is not a database"):
        opened(garbage)
    assert garbage.read_bytes() == before
    with pytest.raises(StorageError, match=r"can't be opened \(Is a directory\): name another one"):
        opened(tmp_path)
    for memory in ("sqlite://", "sqlite:///:memory:", ":memory:"):
        with pytest.raises(ValidationError, match="SQLite without a file"):
            opened(memory)
    with pytest.raises(ValidationError, match="needs a driver that isn't installed"):
        opened("nosuchdatabase://host/name")
    with pytest.raises(ValidationError, match="--database is a URL such as") as error:
        opened("postgresql://ann:hidden@host:port:port/name")
    assert "hidden" not in str(error.value)


@pytest.mark.parametrize(
    "version, way", [(VERSION + 1, "update mechanex"), (OLDEST_VERSION - 1, "version that made it")]
)
def test_another_schema_version_is_refused_and_left_alone(
    sqlite_store: Store, mechanex_home: Path, version: int, way: str
) -> None:
    sqlite_store.users.sign_up("ann@example.org", "correct horse")
    sqlite_store.close()
    file = mechanex_home / "server.sqlite"
    with sqlite3.connect(file) as connection:
        connection.execute("UPDATE mechanex_schema SET version = ?", (version,))
        if version < OLDEST_VERSION:
            connection.execute("DROP TABLE mechanex_alembic")
        else:
            connection.execute("UPDATE mechanex_alembic SET version_num = ?", (str(version),))
    with pytest.raises(
        StorageError,
        match=f"schema version {version}, and this version .* reads {OLDEST_VERSION} to {VERSION}: .*{way}",
    ):
        opened()
    with sqlite3.connect(file) as connection:
        assert connection.execute("SELECT version FROM mechanex_schema").fetchall() == [(version,)]
        assert connection.execute("SELECT count(*) FROM mechanex_users").fetchone() == (2,)


def made_by(version: int, database: str | None, home: Path) -> None:
    """Makes the database that a server of this schema version left behind; see ``databases``."""
    kind = "sqlite" if database is None else "postgresql"
    text = (Path(__file__).parent / "databases" / f"version_4.{kind}.sql").read_text()
    if version < 4:
        text += "ALTER TABLE mechanex_behaviors DROP COLUMN watched;\n"
    if version < 3:
        text += "DROP INDEX mechanex_refresh_tokens_access;\n"
        text += "ALTER TABLE mechanex_refresh_tokens DROP COLUMN access_hash;\n"
        text += "ALTER TABLE mechanex_refresh_tokens DROP COLUMN access_expires_at;\n"
    text += f"UPDATE mechanex_schema SET version = {version};\n"
    home.mkdir(exist_ok=True)
    if database is None:
        with sqlite3.connect(home / "server.sqlite") as connection:
            connection.executescript(text)
        connection.close()
        return
    engine = create_engine(database)
    with engine.begin() as made:
        made.exec_driver_sql(text)
    engine.dispose()


@pytest.mark.parametrize("version", range(OLDEST_VERSION, VERSION))
@on_each_database
def test_a_database_of_an_earlier_version_goes_on_with_what_it_holds(
    database: str | None, mechanex_home: Path, version: int
) -> None:
    made_by(version, database, mechanex_home)
    files = mechanex_home / "server" / "vectors"
    files.mkdir(parents=True)
    VECTOR.save(files / f"{'e' * 32}.safetensors")
    with ThreadPoolExecutor(4) as pool:  # several servers that share it start together
        again, *others = list(pool.map(lambda _: opened(database), range(4)))
    for other in others:
        other.close()
    ann = "a" * 32
    assert (
        again.keys.opened_by("mx-today") == KeyHolder(ann, None) and again.keys.all(ann)[0].name == "laptop"
    )
    assert again.library.vector(ann, "e" * 32) == VECTOR
    (kept,) = again.library.behaviors(ann)
    assert (kept.behavior_name, kept.steering_vector_id, kept.n_examples) == ("calm", "e" * 32, 1)
    assert again.library.watched(ann, "calm") is None
    newer = again.sessions.refresh("mxr-today")
    assert again.sessions.account_for(newer.access_token) == ann
    assert version < 3 or again.sessions.account_for("mxa-today") == ann
    assert again.users.log_in("ann@example.org", "correct horse battery")
    assert _differences(again.database) == []
    again.close()
    opened(database).close()


@on_each_database
def test_the_migrations_of_a_new_database_make_the_tables_as_they_are_described(store: Store) -> None:
    assert _differences(store.database) == []


def _differences(database: Database) -> list[Any]:
    with database.read() as connection:
        context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE})
        return list(compare_metadata(context, metadata))


def test_a_migration_that_fails_changes_nothing(mechanex_home: Path) -> None:
    made_by(4, None, mechanex_home)
    file = mechanex_home / "server.sqlite"
    with sqlite3.connect(file) as connection:  # the last column that the step adds is there
        connection.execute("ALTER TABLE mechanex_behaviors ADD COLUMN n_bytes BIGINT")
        before = list(connection.execute("SELECT sql FROM sqlite_master ORDER BY name"))
    connection.close()
    with pytest.raises(StorageError, match="duplicate column name"):
        opened()
    with sqlite3.connect(file) as connection:
        assert list(connection.execute("SELECT sql FROM sqlite_master ORDER BY name")) == before
        assert list(connection.execute("SELECT version FROM mechanex_schema")) == [(4,)]
    connection.close()


@pytest.mark.ci
@on_each_database
def test_a_new_database_can_be_opened_by_many_at_once(database: str | None, tmp_path: Path) -> None:
    code = (
        "import sys; from mechanex.server.library.database import Database\n"
        "sys.stdin.read(1); Database(sys.argv[1]).close(); print('opened')"
    )
    starting = [
        subprocess.Popen(
            [sys.executable, "-c", code, database or str(tmp_path / "new.sqlite")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    for process in starting:
        assert process.stdin is not None
        process.stdin.write("x")
        process.stdin.flush()
    for process in starting:
        out, err = process.communicate(timeout=300)
        assert out == "opened\n", err


@pytest.mark.ci
@on_each_database
def test_several_servers_can_share_a_database(database: str | None) -> None:
    store = opened(database)
    code = (
        "import sys; from mechanex.server.settings import ServerSettings\n"
        "from mechanex.server.accounts.store import open_store\n"
        "store, token = open_store(ServerSettings(database=sys.argv[2] or None)), sys.argv[1]\n"
        "print('ready', flush=True); sys.stdin.read(1)\n"
        "for _ in range(60): token = store.sessions.refresh(token).refresh_token\n"
        "print(token)"
    )
    tokens = [store.users.sign_up(f"{i}@example.org", "correct horse")[1].refresh_token for i in range(3)]
    servers = [
        subprocess.Popen(
            [sys.executable, "-c", code, token, database or ""],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for token in tokens
    ]
    for server in servers:
        assert server.stdout is not None and server.stdout.readline() == "ready\n"
    for server in servers:
        assert server.stdin is not None
        server.stdin.write("x")
        server.stdin.flush()
    for server in servers:
        out, err = server.communicate(timeout=300)
        assert server.returncode == 0, err
        assert store.sessions.refresh(out.strip())
    store.close()


def test_writing_while_another_process_holds_the_database_waits_or_says_so(
    sqlite_store: Store, mechanex_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = sqlite3.connect(mechanex_home / "server.sqlite", isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    threading.Timer(0.3, other.execute, ["COMMIT"]).start()
    ann, _ = sqlite_store.users.sign_up("ann@example.org", "correct horse")
    assert sqlite_store.users.get(ann.id) == ann
    sqlite_store.close()
    monkeypatch.setattr("mechanex.server.library.database.BUSY_MS", 50)
    impatient = opened()
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StorageError, match=r"\[503\] .*busy or away \(database is locked\): try again"):
        impatient.keys.create(ann.id, "laptop")
    assert impatient.users.get(ann.id) == ann  # readers don't wait for a writer
    other.execute("COMMIT")
    assert impatient.keys.opened_by(impatient.keys.create(ann.id, "laptop")[0]) == KeyHolder(ann.id, None)
    other.close()
    impatient.close()


def test_threads_that_open_a_new_database_find_one(postgresql: Postgres) -> None:
    for _ in range(8):
        url, together = postgresql.new_database(), threading.Barrier(6)

        def work(place: int, url: str = url, together: threading.Barrier = together) -> bool:
            together.wait()
            time.sleep(
                place * 0.004
            )  # so that one looks before another has made the tables, and makes them after
            Database(url).close()
            return True

        with ThreadPoolExecutor(6) as pool:
            assert all(pool.map(work, range(6)))


@pytest.mark.ci
def test_a_database_that_goes_away_is_an_error_that_passes(postgresql: Postgres) -> None:
    url = postgresql.new_database()
    store = opened(url)
    ann, session = store.users.sign_up("ann@example.org", "correct horse")
    postgresql.stop()
    for attempt in (
        lambda: store.sessions.account_for(session.access_token),
        lambda: store.keys.create(ann.id, "laptop"),
        lambda: store.library.add_vector(ann.id, VECTOR),
        lambda: opened(url),
    ):
        with pytest.raises(StorageError, match=r"\[503\] .*busy or away") as error:
            attempt()
        assert "secret" not in str(error.value)
    postgresql.start()
    assert store.sessions.account_for(session.access_token) == ann.id
    assert store.library.vectors(ann.id) == []
    store.close()


def test_other_databases_can_hold_the_tables() -> None:
    dialect: Any = mysql.dialect()
    for table in metadata.sorted_tables:
        assert f"CREATE TABLE {table.name}" in str(CreateTable(table).compile(dialect=dialect))


# Many at once


@on_each_database
def test_eight_threads_refresh_and_make_keys(store: Store) -> None:
    def work(number: int) -> tuple[str, set[str]]:
        account, session = store.users.sign_up(f"user{number}@example.org", "correct horse")
        keys = set()
        for _ in range(10):
            session = store.sessions.refresh(session.refresh_token)
            keys.add(store.keys.create(account.id, "k")[0])
            assert store.sessions.account_for(session.access_token) == account.id
        return account.id, keys

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(work, range(8)))
    for account_id, keys in results:
        assert len(store.keys.all(account_id)) == 10
        assert {store.keys.opened_by(key) for key in keys} == {KeyHolder(account_id, None)}


@on_each_database
def test_of_eight_threads_with_one_refresh_token_one_goes_on(store: Store) -> None:
    account, session = store.users.sign_up("ann@example.org", "correct horse")
    barrier = threading.Barrier(8)

    def work(given: Session) -> Session | None:
        barrier.wait()
        try:
            return store.sessions.refresh(given.refresh_token)
        except AuthenticationError:
            return None

    with ThreadPoolExecutor(8) as pool:
        pairs = list(pool.map(work, [session] * 8))  # as if seven answers were lost
        assert None not in pairs and len({pair.refresh_token for pair in pairs if pair}) == 8
        assert sum(one is not None for one in pool.map(work, [pair for pair in pairs if pair])) == 1
    with pytest.raises(AuthenticationError, match="session has ended"):
        store.sessions.account_for(session.access_token)
    assert store.users.get(account.id) == account


@on_each_database
def test_of_eight_threads_with_one_address_one_signs_up(store: Store) -> None:
    def work(_: int) -> bool:
        try:
            store.users.sign_up("ann@example.org", "correct horse")
        except ValidationError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(work, range(8))) == 1


# Rates


def test_a_client_may_ask_so_often_a_minute_and_is_told_when_again(clock: Clock) -> None:
    limit = RateLimit("requests", 6, clock)
    for _ in range(6):
        limit.take("a")
    clock.pass_by(50)
    for attempt in (limit.take, limit.check):
        with pytest.raises(
            RateLimitError, match=r"\[429\] Too many requests: at most 6 a minute.* in 10 s"
        ) as error:
            attempt("a")
        assert error.value.retry_after == 10
    limit.take("b")
    clock.pass_by(9.5)
    with pytest.raises(RateLimitError) as error:
        limit.take("a")
    assert error.value.retry_after == 1
    limit.give_back("a")
    limit.take("a")
    with pytest.raises(RateLimitError):
        limit.take("a")
    clock.pass_by(0.5)
    for _ in range(6):
        limit.take("a")
    with pytest.raises(RateLimitError):
        limit.take("a")


def test_a_crowd_of_clients_does_not_free_the_busy_one_and_is_forgotten(clock: Clock) -> None:
    limit = RateLimit("requests", 2, clock)
    refused = 0
    for stranger in range(1000):
        limit.take(str(stranger))
        try:
            limit.take("busy")
        except RateLimitError:
            refused += 1
    assert refused == 998
    clock.pass_by(60)
    limit.give_back("busy")  # whose minute is over: nothing comes of it
    limit.take("later")
    assert list(limit._minutes) == ["later"]


def test_counting_requests_starts_no_threads() -> None:
    limit = RateLimit("requests", 1_000)
    before = threading.active_count()
    for _ in range(50):
        limit.take("a")
    assert threading.active_count() <= before  # one of another test may end meanwhile


def test_of_many_threads_as_many_get_in_as_may() -> None:
    def clock() -> float:
        time.sleep(1e-4)  # another thread's turn
        return 0.0

    limit = RateLimit("requests", 100, clock)

    def let_in(_: int) -> bool:
        try:
            limit.take("a")
        except RateLimitError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(let_in, range(500))) == 100


def test_one_client_is_an_ipv4_address_or_a_network_of_ipv6() -> None:
    assert client_address("10.0.0.1") == "10.0.0.1" != client_address("10.0.0.2")
    assert client_address("2001:db8::1") == client_address("2001:db8::ffff:2")
    assert client_address("2001:db8::1") != client_address("2001:db8:0:1::1")
    assert client_address("::ffff:10.0.0.1") == "10.0.0.1"
    assert client_address(None) == client_address("") == "?"


def database_bytes() -> bytes:
    from mechanex.home import mechanex_home

    return b"".join(path.read_bytes() for path in mechanex_home().glob("server.sqlite*"))
