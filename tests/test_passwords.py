"""Passwords and keys that nobody guesses."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator

import pytest
from test_store import CHEAP, opened

from mechanex import AuthenticationError, ValidationError
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
