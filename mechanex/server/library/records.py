"""The steering vectors and behaviors of accounts: rows that say whose they are, and files of vectors."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, Table, delete, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from ...errors import NotFoundError, ValidationError
from .database import Database, StorageError
from .files import BehaviorFiles, VectorFiles, storage_error
from .kept import KeptBehavior, KeptVector
from .pending import Pending
from .schema import SHARED_ACCOUNT, behaviors, is_id, new_id, users, vectors

if TYPE_CHECKING:
    from ...engine.sae.behavior import Behavior
    from ...engine.vectors import SteeringVector

__all__ = ["Library"]


class Library:
    """What accounts have made. An account of None is the shared one. Methods block; any thread may call them.

    A file is whole and on the disk before its row is, and goes after it; a file without a row belongs to nobody and
    is never read.

    Args:
        database: where the rows are.
        files: where the vectors are.
        detectors: where that is which watches for behaviors, by the behaviors' ids.
        pending: notes of the files that are being written or deleted.
        clock: seconds since 1970.
        most: vectors, and behaviors, that one account may keep; the shared account has no bound.
        most_bytes: that they may take together.
    """

    def __init__(
        self,
        database: Database,
        files: VectorFiles,
        detectors: BehaviorFiles,
        pending: Pending,
        clock: Callable[[], float],
        most: int,
        most_bytes: int,
    ) -> None:
        self._database = database
        self._files = files
        self._detectors = detectors
        self._pending = pending
        self._clock = clock
        self._most = most
        self._most_bytes = most_bytes

    def settle(self) -> None:
        """Deletes the files that servers of this database left without rows when they were killed.

        Raises:
            StorageError: the database can't be read.
        """
        for files in (self._files, self._detectors):
            files.sweep_old()
        self._pending.settle(self._settle)
        self._weigh()

    def _settle(self, ids: list[str]) -> None:
        for files, table in ((self._files, vectors), (self._detectors, behaviors)):
            for file_id in ids:
                with self._database.read() as connection:
                    owned = connection.scalar(select(table.c.id).where(table.c.id == file_id)) is not None
                files.sweep(file_id, keep=owned)

    def _weigh(self) -> None:
        """Notes the bytes of what a version kept that didn't count them."""
        unknown = select(vectors.c.id).where(vectors.c.n_bytes.is_(None))
        unknown_behaviors = select(behaviors.c.id, behaviors.c.examples).where(behaviors.c.n_bytes.is_(None))
        with self._database.read() as connection:
            sizes = [(vectors, one, self._files.size(one)) for one in connection.scalars(unknown)]
            for row in connection.execute(unknown_behaviors):
                size = len(row.examples) + self._detectors.size(row.id)
                sizes.append((behaviors, row.id, size))
        if sizes:
            with self._database.write() as connection:
                for table, row_id, size in sizes:
                    connection.execute(update(table).where(table.c.id == row_id).values(n_bytes=size))

    def close(self) -> None:
        """Ends this server's part."""
        self._pending.close()

    def add_vector(self, account_id: str | None, vector: SteeringVector) -> str:
        """Keeps a vector and returns its id.

        Raises:
            ValidationError: the account keeps as many as it may.
            StorageError: the file or the database can't be written; nothing is kept then.
        """
        with self._filed(vector) as vector_id, self._database.write() as connection:
            self._own(connection, account_id, vector_id)
        return vector_id

    def vector(self, account_id: str | None, vector_id: str) -> SteeringVector | None:
        """The account's vector, or None: also for another account's.

        Raises:
            StorageError: its file is missing or damaged.
        """
        if not self._owns(account_id, vector_id):
            return None
        try:
            return self._files.load(vector_id)
        except StorageError:
            if self._owns(account_id, vector_id):
                raise
            return None  # it was deleted just now

    def vectors(self, account_id: str | None) -> list[KeptVector]:
        """The account's vectors, oldest first."""
        owner = account_id or SHARED_ACCOUNT
        kept = select(vectors.c.id, vectors.c.created_at).where(vectors.c.user_id == owner)
        named = select(behaviors.c.vector_id, behaviors.c.behavior_name).where(behaviors.c.user_id == owner)
        with self._database.read() as connection:
            rows = connection.execute(kept.order_by(vectors.c.created_at, vectors.c.id)).all()
            names: dict[str, list[str]] = {}
            for vector_id, name in connection.execute(named):
                names.setdefault(vector_id, []).append(name)
        # Databases have orders of texts of their own.
        return [KeptVector(row.id, tuple(sorted(names.get(row.id, ()))), row.created_at) for row in rows]

    def delete_vector(self, account_id: str | None, vector_id: str) -> None:
        """Deletes a vector.

        Raises:
            NotFoundError: the account has none with this id.
            ValidationError: a behavior uses it.
        """
        if not self._owns(account_id, vector_id):
            raise _no_vector(vector_id)
        users = select(behaviors.c.behavior_name).where(behaviors.c.vector_id == vector_id)
        with self._noted(vector_id):
            try:
                with self._database.write() as connection:
                    names = sorted(connection.scalars(users))
                    if names:
                        raise _in_use(vector_id, names)
                    connection.execute(delete(vectors).where(vectors.c.id == vector_id))
            except IntegrityError as error:  # a behavior was made of it just now
                raise _in_use(vector_id, []) from error
            self._files.remove(vector_id)

    def check_room(self, account_id: str | None) -> None:
        """Raises a ValidationError where the account keeps as many vectors as it may."""
        with self._database.read() as connection:
            self._check_room(connection, account_id, vectors)

    def add_behavior(
        self,
        account_id: str | None,
        name: str,
        description: str,
        examples: Mapping[str, Sequence[Any]],
        vector: SteeringVector | str,
        watched: Behavior | None = None,
    ) -> KeptBehavior:
        """Keeps a behavior: with a vector, which is kept too, or with the id of one that is there, and its detector.

        Raises:
            NotFoundError: the account has no such vector.
            ValidationError: the account has a behavior of this name, or keeps as many vectors or behaviors as it may.
            StorageError: the file or the database can't be written; nothing is kept then.
        """
        given = vector if isinstance(vector, str) else None
        if given is not None and not self._owns(account_id, given):
            raise _no_vector(given)
        filed = nullcontext(vector) if isinstance(vector, str) else self._filed(vector)
        told = None if watched is None else watched.as_dict()
        n_examples, told_examples = len(examples["prompts"]), json.dumps(examples)
        try:
            with (
                filed as vector_id,
                self._watching(watched) as behavior_id,
                self._database.write() as connection,
            ):
                made = KeptBehavior(
                    behavior_id, name, description, vector_id, n_examples, self._clock(), told
                )
                n_bytes = len(told_examples) + self._detectors.size(behavior_id)
                if given is None:
                    self._own(connection, account_id, vector_id)
                self._check_room(connection, account_id, behaviors, n_bytes)
                connection.execute(
                    insert(behaviors).values(
                        id=made.id,
                        user_id=account_id or SHARED_ACCOUNT,
                        behavior_name=name,
                        description=description,
                        vector_id=vector_id,
                        examples=told_examples,
                        n_examples=made.n_examples,
                        created_at=made.created_at,
                        watched=None if told is None else json.dumps(told),
                        n_bytes=n_bytes,
                    )
                )
        except IntegrityError as error:
            if given is not None and not self._owns(account_id, given):  # it was deleted just now
                raise _no_vector(given) from error
            raise _taken(name) from error
        return made

    def check_name(self, account_id: str | None, name: str) -> None:
        """Raises a ValidationError where the account has a behavior of this name."""
        if self.behavior_vector_id(account_id, name) is not None:
            raise _taken(name)

    def behavior_vector_id(self, account_id: str | None, name: str) -> str | None:
        """The id of the vector of the account's behavior, or None."""
        if "\x00" in name:  # which some databases can't even look for
            return None
        with self._database.read() as connection:
            found: str | None = connection.scalar(
                select(behaviors.c.vector_id).where(*_named(account_id, name))
            )
        return found

    def watched(self, account_id: str | None, name: str) -> Behavior | None:
        """What watches for the account's behavior; None where that is a vector alone, or isn't there.

        Raises:
            StorageError: its file is missing or damaged.
        """
        if "\x00" in name:
            return None
        wanted = select(behaviors.c.id).where(*_named(account_id, name), behaviors.c.watched.is_not(None))
        with self._database.read() as connection:
            behavior_id: str | None = connection.scalar(wanted)
        return None if behavior_id is None else self.detector(behavior_id)

    def detector(self, behavior_id: str) -> Behavior | None:
        """What watches for a behavior that was there just now; None where it isn't any more.

        Raises:
            StorageError: its file is missing or damaged.
        """
        try:
            return self._detectors.load(behavior_id)
        except StorageError:
            with self._database.read() as connection:
                there = connection.scalar(select(behaviors.c.id).where(behaviors.c.id == behavior_id))
            if there is not None:
                raise
            return None

    def behaviors(self, account_id: str | None) -> list[KeptBehavior]:
        """The account's behaviors, oldest first; their examples, which may be long, stay unread."""
        wanted = select(
            behaviors.c.id,
            behaviors.c.behavior_name,
            behaviors.c.description,
            behaviors.c.vector_id,
            behaviors.c.n_examples,
            behaviors.c.created_at,
            behaviors.c.watched,
        ).where(behaviors.c.user_id == (account_id or SHARED_ACCOUNT))
        with self._database.read() as connection:
            rows = connection.execute(wanted.order_by(behaviors.c.created_at, behaviors.c.id)).all()
        return [KeptBehavior(*row[:-1], None if row[-1] is None else json.loads(row[-1])) for row in rows]

    def delete_behavior(self, account_id: str | None, name: str) -> None:
        """Deletes a behavior; its vector stays.

        Raises:
            NotFoundError: the account has none of this name.
        """
        found: str | None = None
        if "\x00" not in name:
            with self._database.read() as connection:
                found = connection.scalar(select(behaviors.c.id).where(*_named(account_id, name)))
        if found is not None:
            with self._noted(found):
                with self._database.write() as connection:
                    gone = connection.execute(delete(behaviors).where(behaviors.c.id == found)).rowcount
                if gone == 1:
                    self._detectors.remove(found)
                    return
        raise NotFoundError(f"no behavior of this account is called {name!r}: GET /behaviors lists them.")

    def delete_all(self, account_id: str) -> None:
        """Deletes everything that an account has made."""
        of_it = behaviors.c.user_id == account_id, vectors.c.user_id == account_id
        with ExitStack() as stack:
            with self._database.write() as connection:
                # Holds off others that make something of it now.
                connection.execute(select(users.c.id).where(users.c.id == account_id).with_for_update())
                detectors = list(connection.scalars(select(behaviors.c.id).where(of_it[0])))
                files = list(connection.scalars(select(vectors.c.id).where(of_it[1])))
                stack.enter_context(self._noted(*detectors, *files))
                connection.execute(delete(behaviors).where(of_it[0]))
                connection.execute(delete(vectors).where(of_it[1]))
            for behavior_id in detectors:
                self._detectors.remove(behavior_id)
            for vector_id in files:
                self._files.remove(vector_id)

    @contextmanager
    def _noted(self, *ids: str) -> Iterator[None]:
        """Has these files noted as ones that are being written or deleted.

        Raises:
            StorageError: they can't be.
        """
        with ExitStack() as stack:
            try:
                stack.enter_context(self._pending.noted(*ids))
            except OSError as error:
                raise storage_error("files can't be noted", error) from error
            yield

    @contextmanager
    def _filed(self, vector: SteeringVector) -> Iterator[str]:
        """The id under which a vector's file is there, and stays where the block ends without an error."""
        vector_id = new_id()
        with self._noted(vector_id):
            self._files.save(vector_id, vector)
            try:
                yield vector_id
            except BaseException:
                self._files.remove(vector_id)
                raise

    @contextmanager
    def _watching(self, watched: Behavior | None) -> Iterator[str]:
        """A new behavior's id, under which its detector's file is there, and stays as ``_filed`` says."""
        behavior_id = new_id()
        if watched is None:
            yield behavior_id
            return
        with self._noted(behavior_id):
            self._detectors.save(behavior_id, watched)
            try:
                yield behavior_id
            except BaseException:
                self._detectors.remove(behavior_id)
                raise

    def _owns(self, account_id: str | None, vector_id: str) -> bool:
        if not is_id(vector_id):
            return False
        owned = select(vectors.c.id).where(
            vectors.c.id == vector_id, vectors.c.user_id == (account_id or SHARED_ACCOUNT)
        )
        with self._database.read() as connection:
            return connection.scalar(owned) is not None

    def _own(self, connection: Connection, account_id: str | None, vector_id: str) -> None:
        n_bytes = self._files.size(vector_id)
        self._check_room(connection, account_id, vectors, n_bytes)
        connection.execute(
            insert(vectors).values(
                id=vector_id,
                user_id=account_id or SHARED_ACCOUNT,
                created_at=self._clock(),
                n_bytes=n_bytes,
            )
        )

    def _check_room(
        self, connection: Connection, account_id: str | None, table: Table, n_bytes: int = 0
    ) -> None:
        """Refuses one more row of the table, whose files take so many bytes, where that is more than the account may
        keep: a ValidationError."""
        if account_id is None:
            return
        # Holds off others that count for this account, where the database lets several write at once.
        connection.execute(select(users.c.id).where(users.c.id == account_id).with_for_update())
        kept = connection.scalar(select(func.count()).where(table.c.user_id == account_id)) or 0
        what, how = (
            ("steering vectors", "DELETE /steering/vectors/{id}; GET /steering/vectors lists them")
            if table is vectors
            else ("behaviors", "DELETE /behaviors/{behavior_name}; GET /behaviors lists them")
        )
        if kept >= self._most:
            raise ValidationError(
                f"this account keeps {kept} {what}, and may keep {self._most}: delete one with {how}."
            )
        taken = sum(
            int(connection.scalar(select(func.sum(one.c.n_bytes)).where(one.c.user_id == account_id)) or 0)
            for one in (vectors, behaviors)
        )
        if taken + max(n_bytes, 1) > self._most_bytes:
            raise ValidationError(
                f"what this account keeps takes {taken:,} bytes, this would take {n_bytes:,}, and it may take "
                f"{self._most_bytes:,} in all: delete one of its {what} with {how}."
            )


def _named(account_id: str | None, name: str) -> tuple[Any, Any]:
    return behaviors.c.user_id == (account_id or SHARED_ACCOUNT), behaviors.c.behavior_name == name


def _no_vector(vector_id: str) -> NotFoundError:
    return NotFoundError(f"no steering vector has the id {vector_id!r}.")


def _taken(name: str) -> ValidationError:
    return ValidationError(f"there is a behavior named {name!r} already: choose another name.")


def _in_use(vector_id: str, names: Sequence[str]) -> ValidationError:
    shown = ", ".join(map(repr, names[:5])) or "that was made just now"
    return ValidationError(
        f"the steering vector {vector_id!r} is that of the behavior {shown}: delete that first."
    )
