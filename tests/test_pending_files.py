"""Files that a killed server left: gone after the next start, and nobody else's with them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from argon2 import PasswordHasher

from mechanex import SteeringVector, ValidationError
from mechanex.server.accounts.passwords import Passwords
from mechanex.server.accounts.store import Store, open_store
from mechanex.server.settings import ServerSettings

VECTOR = SteeringVector({2: torch.tensor([1.0, -2.0, 0.5])}, model="m", method="caa")
CHEAP = Passwords(PasswordHasher(time_cost=1, memory_cost=8, parallelism=1))

# A server that is killed at the point that is named: its file is there and its row isn't, half of its file is, the row
# is there and nobody was told, the row is gone and the file isn't.
KILLED = """
import os, sys
import torch
from mechanex import SteeringVector
from mechanex.server.accounts.store import open_store
from mechanex.server.library.files import _Files
from mechanex.server.settings import ServerSettings
library = open_store(ServerSettings(database=sys.argv[2])).library
vector = SteeringVector({2: torch.tensor([1.0, -2.0, 0.5])}, model="m", method="caa")
if sys.argv[1] == "no row":
    with library._filed(vector):
        os._exit(9)
if sys.argv[1] == "half a file":
    os.replace = lambda *_: os._exit(9)
    library.add_vector(None, vector)
if sys.argv[1] == "a row":
    with library._noted(library.add_vector(None, vector)):
        os._exit(9)
_Files.remove = lambda *_: os._exit(9)
library.delete_vector(None, library.add_vector(None, vector))
"""

Open = Callable[..., Store]


@pytest.fixture
def start() -> Iterator[Open]:
    with ExitStack() as stack:

        def opened(**settings: object) -> Store:
            store = open_store(ServerSettings(**settings), passwords=CHEAP)  # type: ignore[arg-type]
            stack.callback(store.database.close)
            return store

        yield opened


def vector_files(home: Path) -> list[Path]:
    return [path for path in (home / "server" / "vectors").glob("*") if path.is_file()]


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="locks of POSIX")
@pytest.mark.parametrize("when", ["no row", "half a file", "a row", "no row any more"])
def test_what_a_killed_server_left_goes_at_the_next_start(
    mechanex_home: Path, tmp_path: Path, start: Open, when: str
) -> None:
    mine, others = tmp_path / "mine.sqlite", tmp_path / "others.sqlite"
    killed = subprocess.run([sys.executable, "-c", KILLED, when, str(mine)], check=False, timeout=300)
    assert killed.returncode == 9
    (left,) = vector_files(mechanex_home)
    start(database=str(others))  # has another database, and knows nothing of whose that is
    assert vector_files(mechanex_home) == [left]
    store = start(database=str(mine))
    kept = store.library.vectors(None)
    assert len(kept) == (when == "a row")
    assert [path.stem for path in vector_files(mechanex_home)] == [one.steering_vector_id for one in kept]
    assert [path.suffix for path in (mechanex_home / "server" / "pending").iterdir()] == [".lock", ".lock"]


def test_what_another_server_is_writing_stays(mechanex_home: Path, start: Open) -> None:
    running = start()
    with running.library._filed(VECTOR) as vector_id:
        start()
        assert [path.stem for path in vector_files(mechanex_home)] == [vector_id]
        with running.database.write() as connection:
            running.library._own(connection, None, vector_id)
    assert start().library.vector(None, vector_id) == VECTOR


def test_half_files_of_long_ago_go_and_new_ones_stay(mechanex_home: Path, start: Open) -> None:
    start().library.add_vector(None, VECTOR)
    folder = mechanex_home / "server" / "vectors"
    old, new = folder / ".a.safetensors.0.tmp", folder / ".b.safetensors.0.tmp"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 2 * 86_400,) * 2)
    start()
    assert new.exists() and not old.exists() and len(vector_files(mechanex_home)) == 2


def test_a_server_that_ends_leaves_no_notes(mechanex_home: Path, start: Open) -> None:
    store = start()
    store.library.delete_vector(None, store.library.add_vector(None, VECTOR))
    store.close()
    assert list((mechanex_home / "server" / "pending").iterdir()) == []


def test_an_account_keeps_so_many_bytes(start: Open) -> None:
    store = start(max_account_bytes=2000)
    ann, _ = store.users.sign_up("ann@example.org", "correct horse")
    first = store.library.add_vector(ann.id, VECTOR)
    examples = {"prompts": ["a" * 1500], "positive_answers": ["b"], "negative_answers": ["c"]}
    with pytest.raises(
        ValidationError, match=r"takes \d+ bytes, this would take 1,5\d\d, and it may take 2,000"
    ):
        store.library.add_behavior(ann.id, "kind", "", examples, VECTOR)
    assert [one.steering_vector_id for one in store.library.vectors(ann.id)] == [first]
    store.library.add_behavior(ann.id, "kind", "", {**examples, "prompts": ["a"]}, first)
    with pytest.raises(ValidationError, match="DELETE /steering/vectors"):
        for _ in range(20):
            store.library.add_vector(ann.id, VECTOR)
    store.library.delete_vector(ann.id, store.library.vectors(ann.id)[-1].steering_vector_id)
    assert store.library.add_vector(ann.id, VECTOR)
    for _ in range(20):  # the operator's own have no bound
        store.library.add_vector(None, VECTOR)


def test_the_bytes_of_what_an_earlier_version_kept_count_too(start: Open) -> None:
    store = start()
    ann, _ = store.users.sign_up("ann@example.org", "correct horse")
    vector_id = store.library.add_vector(ann.id, VECTOR)
    with store.database.write() as connection:
        connection.exec_driver_sql("UPDATE mechanex_vectors SET n_bytes = NULL")
    size = store.library._files.size(vector_id)
    with pytest.raises(ValidationError, match=f"takes {size} bytes"):
        start(max_account_bytes=size + 1).library.add_vector(ann.id, VECTOR)
