"""The server's database: how it is opened, what a transaction promises, and what its failures say."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, inspect, select
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import (
    ArgumentError,
    DBAPIError,
    IntegrityError,
    NoSuchModuleError,
    OperationalError,
    SQLAlchemyError,
)
from sqlalchemy.exc import TimeoutError as PoolTimeout

from ...errors import MechanexError, ValidationError
from ...extras import install_line
from .migrate import migrate
from .schema import OLDEST_VERSION, VERSION, VERSION_TABLE, metadata, revisions, schema_info

__all__ = ["Database", "StorageError"]

_logger = logging.getLogger(__name__)

BUSY_MS = 10_000


class StorageError(MechanexError):
    """Raised when the server's database or one of its files can't be read or written.

    ``status_code`` is 507 for a full disk, 503 for what may pass, 500 for what needs repair.
    """


class Database:
    """A database with the server's tables, made on first use.

    A transaction of ``write`` that has ended without an error is on the disk: SQLite runs with a write-ahead
    log that is flushed at every commit.

    Args:
        url: ``sqlite:///path``, ``postgresql://…`` or any other URL of SQLAlchemy, or a file's path, which
            means SQLite.

    Raises:
        ValidationError: not a URL, a driver that isn't installed, or SQLite in memory.
        StorageError: the database can't be opened, is damaged, belongs to another program, or was made by
            another version.
    """

    def __init__(self, url: str | os.PathLike[str]) -> None:
        self.url = _parsed(os.fspath(url))
        self._sqlite = self.url.get_backend_name() == "sqlite"
        # SQLite has one writer: threads queue here, fairly, and only other processes at its own lock.
        self._writer: Any = threading.Lock() if self._sqlite else contextlib.nullcontext()
        if self._sqlite:
            _make_file(Path(str(self.url.database)))
        try:
            self._engine = _engine(self.url, self._sqlite)
        except (NoSuchModuleError, ModuleNotFoundError) as error:
            extra = self.url.drivername in ("postgresql", "postgresql+psycopg")
            how = install_line("postgres") if extra else "install it"
            raise ValidationError(
                f"the database {self.name} needs a driver that isn't installed ({error}): {how}, or leave "
                "--database out for SQLite."
            ) from error
        self._reading = self._engine
        if not self._sqlite:
            dialect: Any = self._engine.dialect
            levels = dialect.get_isolation_level_values(None)
            steady = "REPEATABLE READ" if "REPEATABLE READ" in levels else "SERIALIZABLE"
            self._reading = self._engine.execution_options(isolation_level=steady)
        try:
            self._prepare()
        except BaseException:
            self.close()
            raise

    @property
    def name(self) -> str:
        """The URL without its password, for messages."""
        return self.url.render_as_string(hide_password=True)

    @property
    def identity(self) -> str:
        """What tells it from other databases, wherever a server was started: the URL, or SQLite's file."""
        return os.path.realpath(str(self.url.database)) if self._sqlite else self.name

    @contextlib.contextmanager
    def read(self) -> Iterator[Connection]:
        """A connection for reading; what it sees doesn't change meanwhile.

        Raises:
            StorageError: the database can't be read.
        """
        with self._explained(), self._reading.connect() as connection:
            yield connection

    @contextlib.contextmanager
    def write(self) -> Iterator[Connection]:
        """One transaction, durable once the block has ended; an error inside takes all of it back.

        Raises:
            StorageError: the database can't be written.
        """
        with self._explained(), self._writer, self._engine.connect() as connection:
            connection = connection.execution_options(mechanex_write=True)
            with connection.begin():
                yield connection

    def close(self) -> None:
        """Closes the connections."""
        self._engine.dispose()

    def _prepare(self) -> None:
        there, version = self._found()
        if version is None and there:
            raise StorageError(
                f"the database {self.name} has tables named {', '.join(sorted(there))} and no version: it isn't "
                "a mechanex server's, or it is damaged. Name another one with --database."
            )
        if version is None or OLDEST_VERSION <= version < VERSION:
            version = self._migrated(version)
        if version != VERSION:
            way = "update mechanex" if version > VERSION else "serve it with the version that made it"
            raise StorageError(
                f"the database {self.name} has schema version {version}, and this version of mechanex reads "
                f"{OLDEST_VERSION} to {VERSION}: {way}, or name another database with --database. Nothing was changed."
            )

    def _found(self) -> tuple[set[str], int | None]:
        """The tables with our names that are there, and the version that they say they have."""
        with self.read() as connection:
            names = inspect(connection).get_table_names()
            there = set(metadata.tables) & set(names)
            found: Any = None
            if VERSION_TABLE in names:
                found = connection.scalar(select(revisions.c.version_num))
            elif schema_info.name in there:
                found = connection.scalar(select(schema_info.c.version))
            return there, None if found is None else int(found)

    def _migrated(self, before: int | None) -> int:
        """The version that the tables have once they were made, or brought to this one's."""
        if before is not None:
            _logger.info("database %s: from schema version %d to %d", self.name, before, VERSION)
        # Another process may be doing the same: where there are no tables yet to wait at, it may be refused.
        refused: Exception | None = None
        try:
            with self.write() as connection:
                migrate(connection)
        except (IntegrityError, StorageError) as error:
            refused = error
        _, version = self._found()
        if refused is not None and version != VERSION:
            raise refused if isinstance(refused, StorageError) else self._error(refused)
        assert version is not None
        return version

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except IntegrityError:
            raise  # the caller's own: a name that is taken
        except (SQLAlchemyError, OSError) as error:
            raise self._error(error) from error

    def _error(self, error: Exception) -> StorageError:
        reason = str(error.orig) if isinstance(error, DBAPIError) else str(error)
        _logger.error("database %s: %s", self.name, reason)
        text = reason.lower()
        if "is full" in text or "no space left" in text:
            return StorageError(f"the server's database can't be written: its disk is full ({reason}).", 507)
        away = isinstance(error, OperationalError) and not self._sqlite
        if away or isinstance(error, PoolTimeout) or "locked" in text:
            return StorageError(f"the server's database is busy or away ({reason}): try again.", 503)
        return StorageError(f"the server's database failed ({reason}): its operator must look at it.", 500)


def _parsed(text: str) -> URL:
    try:
        url = make_url(text if "://" in text else f"sqlite:///{Path(text).expanduser()}")
    except (ArgumentError, ValueError) as error:
        raise ValidationError(
            "--database is a URL such as sqlite:///accounts.db or postgresql://user:password@host/name, or a "
            f"file's path; got {text.split('@')[-1]!r}."
        ) from error
    if url.get_backend_name() == "sqlite" and url.database in (None, "", ":memory:"):
        raise ValidationError(
            f"the database is SQLite without a file ({text!r}), and accounts must outlive the server: name a file."
        )
    return url


def _make_file(path: Path) -> None:
    """Makes SQLite's file readable for its owner only; the log beside it takes the same permissions."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    except OSError as error:
        raise StorageError(
            f"the database {path} can't be opened ({error.strerror}): name another one with --database."
        ) from error


def _engine(url: URL, sqlite: bool) -> Engine:
    if not sqlite:
        return create_engine(url, pool_pre_ping=True, hide_parameters=True)
    engine = create_engine(url, hide_parameters=True)

    @event.listens_for(engine, "connect")
    def _configure(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # transactions begin where _begin says, not at the first INSERT
        for pragma in (
            f"busy_timeout={BUSY_MS}",
            "journal_mode=WAL",
            "synchronous=FULL",
            "foreign_keys=ON",
        ):
            connection.execute(f"PRAGMA {pragma}").close()

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        # A transaction that reads first and locks later can fail at once where another process wrote between.
        writes = connection.get_execution_options().get("mechanex_write")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine
