"""Passwords that nobody guesses, and files that belong to nobody."""

from __future__ import annotations

import os
import time
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_store import CHEAP, VECTOR, opened

from mechanex import AuthenticationError, ValidationError
from mechanex.home import mechanex_home
from mechanex.server.accounts.passwords import Passwords
from mechanex.server.accounts.store import Store
from mechanex.server.settings import ServerSettings

pytestmark = pytest.mark.slow


@pytest.fixture
def store() -> Iterator[Store]:
    store = opened()
    yield store
    store.close()


def test_a_letter_with_an_accent_is_one_letter_however_it_is_typed(store: Store) -> None:
    password = "crème brûlée für Zoë"
    store.users.sign_up("anna@example.org", unicodedata.normalize("NFD", password))
    store.users.log_in("anna@example.org", unicodedata.normalize("NFC", password))
    store.users.log_in("anna@example.org", unicodedata.normalize("NFD", password))
    with pytest.raises(AuthenticationError):
        store.users.log_in("anna@example.org", "creme brulee fur Zoe")


def test_passwords_that_were_hashed_as_they_came_still_open() -> None:
    password = unicodedata.normalize("NFD", "crème brûlée")
    stored = CHEAP.hash(password.encode())
    assert Passwords(CHEAP).verify(stored, password)
    assert not Passwords(CHEAP).verify(stored, "creme brulee")


def test_a_short_key_is_refused_where_others_can_try_it() -> None:
    with pytest.raises(ValidationError, match="needs 16"):
        ServerSettings(host="0.0.0.0", key="hunter2").server_key()
    with pytest.raises(ValidationError, match="needs 16"):
        ServerSettings(host="10.1.2.3").server_key({"MECHANEX_SERVER_KEY": "hunter2"})
    assert ServerSettings(host="127.0.0.1", key="hunter2").server_key() == "hunter2"
    assert ServerSettings(host="0.0.0.0", key="0123456789abcdef").server_key() == "0123456789abcdef"


def test_what_a_kill_left_behind_goes_at_the_next_start(store: Store) -> None:
    kept = store.library.add_vector(None, VECTOR)
    folder = mechanex_home() / "server" / "vectors"
    old, new = folder / f"{'a' * 32}.safetensors", folder / f"{'b' * 32}.safetensors"
    left, others = folder / f".{'c' * 32}.safetensors.12ab34cd.tmp", folder / "notes.txt"
    for path in (old, new, left, others):
        path.write_bytes(b"x")
        if path is not new:
            _age(path)
    _age(folder / f"{kept}.safetensors")
    store.close()
    again = opened()
    assert {path.name for path in folder.iterdir()} == {f"{kept}.safetensors", new.name, "notes.txt"}
    assert again.library.vector(None, kept) is not None
    again.close()


def _age(path: Path) -> None:
    os.utime(path, (time.time() - 3600, time.time() - 3600))
