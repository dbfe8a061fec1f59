"""The steering vectors and behaviors of accounts: files of vectors, and rows that say whose they are."""

from __future__ import annotations

import errno
import json
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, insert, select
from sqlalchemy.exc import IntegrityError

from ..errors import MechanexError, NotFoundError, ValidationError
from .database import Database, StorageError
from .schema import SHARED_ACCOUNT, behaviors, is_id, new_id, vectors

if TYPE_CHECKING:
    from ..engine.vectors import SteeringVector

__all__ = ["Behavior", "Library"]

_logger = logging.getLogger(__name__)

_CACHED = 64
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass(frozen=True)
class Behavior:
    """A named vector; ``examples`` holds the lists it was made from."""

    id: str
    behavior_name: str
    description: str
    steering_vector_id: str
    examples: Mapping[str, Sequence[Any]]
    created_at: float


class Library:
    """What accounts have made. An account of None is the shared one. Methods block; any thread may call them.

    A file is whole and on the disk before its row is; a file without a row belongs to nobody and is never read.

    Args:
        database: where the rows are.
        folder: where the vectors' files are.
        clock: seconds since 1970.
    """

    def __init__(self, database: Database, folder: Path, clock: Callable[[], float]) -> None:
        self._database = database
        self._folder = folder
        self._clock = clock
        self._cache: OrderedDict[str, SteeringVector] = OrderedDict()
        self._cache_lock = threading.Lock()

    def add_vector(self, account_id: str | None, vector: SteeringVector) -> str:
        """Keeps a vector and returns its id.

        Raises:
            StorageError: the file or the database can't be written; nothing is kept then.
        """
        vector_id = self._save(vector)
        try:
            with self._database.write() as connection:
                self._own(connection, account_id, vector_id)
        except BaseException:
            self._path(vector_id).unlink(missing_ok=True)
            raise
        self._remember(vector_id, vector)
        return vector_id

    def vector(self, account_id: str | None, vector_id: str) -> SteeringVector | None:
        """The account's vector, or None: also for another account's.

        Raises:
            StorageError: its file is missing or damaged.
        """
        if not self._owns(account_id, vector_id):
            return None
        with self._cache_lock:
            if vector_id in self._cache:
                self._cache.move_to_end(vector_id)
                return self._cache[vector_id]
        from ..engine.vectors import SteeringVector

        try:
            vector = SteeringVector.load(self._path(vector_id))
        except (MechanexError, OSError) as error:
            _logger.error("steering vector %s can't be read: %s", vector_id, error)
            raise StorageError(
                f"the file of steering vector {vector_id!r} is {_defect(error)} on the server: make the vector "
                "again, or have the operator restore it.",
                500,
            ) from error
        self._remember(vector_id, vector)
        return vector

    def add_behavior(
        self,
        account_id: str | None,
        name: str,
        description: str,
        examples: Mapping[str, Sequence[Any]],
        vector: SteeringVector | str,
    ) -> Behavior:
        """Keeps a behavior: with a vector, which is kept too, or with the id of one that is there.

        Raises:
            NotFoundError: the account has no such vector.
            ValidationError: the account has a behavior of this name.
            StorageError: the file or the database can't be written; nothing is kept then.
        """
        given = isinstance(vector, str)
        if isinstance(vector, str):
            if not self._owns(account_id, vector):
                raise NotFoundError(f"no steering vector has the id {vector!r}.")
            vector_id = vector
        else:
            vector_id = self._save(vector)
        made = Behavior(new_id(), name, description, vector_id, examples, self._clock())
        try:
            with self._database.write() as connection:
                if not given:
                    self._own(connection, account_id, vector_id)
                connection.execute(
                    insert(behaviors).values(
                        id=made.id,
                        user_id=account_id or SHARED_ACCOUNT,
                        behavior_name=name,
                        description=description,
                        vector_id=vector_id,
                        examples=json.dumps(examples),
                        created_at=made.created_at,
                    )
                )
        except BaseException as error:
            if not given:
                self._path(vector_id).unlink(missing_ok=True)
            if isinstance(error, IntegrityError):
                raise _taken(name) from error
            raise
        return made

    def check_name(self, account_id: str | None, name: str) -> None:
        """Raises a ValidationError where the account has a behavior of this name."""
        if self.behavior_vector_id(account_id, name) is not None:
            raise _taken(name)

    def behavior_vector_id(self, account_id: str | None, name: str) -> str | None:
        """The id of the vector of the account's behavior, or None; leaves its examples, which may be long, unread."""
        wanted = select(behaviors.c.vector_id).where(
            behaviors.c.user_id == (account_id or SHARED_ACCOUNT), behaviors.c.behavior_name == name
        )
        with self._database.read() as connection:
            found: str | None = connection.scalar(wanted)
        return found

    def behavior(self, account_id: str | None, name: str) -> Behavior | None:
        """The account's behavior, or None."""
        found = self._behaviors(account_id, name)
        return found[0] if found else None

    def behaviors(self, account_id: str | None) -> list[Behavior]:
        """The account's behaviors, oldest first."""
        return self._behaviors(account_id, None)

    def _behaviors(self, account_id: str | None, name: str | None) -> list[Behavior]:
        wanted = select(behaviors).where(behaviors.c.user_id == (account_id or SHARED_ACCOUNT))
        if name is not None:
            wanted = wanted.where(behaviors.c.behavior_name == name)
        with self._database.read() as connection:
            rows = connection.execute(wanted.order_by(behaviors.c.created_at, behaviors.c.id)).all()
        return [
            Behavior(
                row.id,
                row.behavior_name,
                row.description,
                row.vector_id,
                json.loads(row.examples),
                row.created_at,
            )
            for row in rows
        ]

    def _owns(self, account_id: str | None, vector_id: str) -> bool:
        if not is_id(vector_id):
            return False
        with self._database.read() as connection:
            return (
                connection.scalar(
                    select(vectors.c.id).where(
                        vectors.c.id == vector_id, vectors.c.user_id == (account_id or SHARED_ACCOUNT)
                    )
                )
                is not None
            )

    def _own(self, connection: Connection, account_id: str | None, vector_id: str) -> None:
        connection.execute(
            insert(vectors).values(
                id=vector_id, user_id=account_id or SHARED_ACCOUNT, created_at=self._clock()
            )
        )

    def _save(self, vector: SteeringVector) -> str:
        vector_id = new_id()
        try:
            vector.save(self._path(vector_id))
            _flush_folder(self._folder)
        except OSError as error:
            _logger.error("steering vector can't be kept in %s: %s", self._folder, error)
            self._path(vector_id).unlink(missing_ok=True)
            full = error.errno in _FULL
            raise StorageError(
                f"the steering vector can't be kept: {error.strerror or error} on the server.",
                507 if full else 500,
            ) from error
        return vector_id

    def _remember(self, vector_id: str, vector: SteeringVector) -> None:
        with self._cache_lock:
            self._cache[vector_id] = vector
            while len(self._cache) > _CACHED:
                self._cache.popitem(last=False)

    def _path(self, vector_id: str) -> Path:
        return self._folder / f"{vector_id}.safetensors"


def _taken(name: str) -> ValidationError:
    return ValidationError(f"there is a behavior named {name!r} already: choose another name.")


def _defect(error: Exception) -> str:
    if isinstance(error, (NotFoundError, FileNotFoundError)):
        return "missing"
    return f"unreadable ({error.strerror})" if isinstance(error, OSError) else "damaged"


def _flush_folder(folder: Path) -> None:
    """Makes the names in a folder durable, where the system can (not on Windows)."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
