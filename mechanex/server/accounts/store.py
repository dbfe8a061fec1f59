"""What the server keeps, opened together: accounts in a database, their steering vectors in files beside it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from starlette.requests import Request

from ...home import mechanex_home
from ..library.database import Database, StorageError
from ..library.files import BehaviorFiles, VectorFiles
from ..library.pending import Pending
from ..library.records import Library
from ..settings import ServerSettings
from .api_keys import ApiKeys
from .passwords import Passwords
from .sessions import Sessions
from .users import Users

__all__ = ["StorageError", "Store", "open_store", "store_of"]


@dataclass(frozen=True)
class Store:
    """Accounts and what belongs to them; all methods of its parts block, and may be called from any thread.

    Args:
        database: where the rows are.
        users: sign-up and log-in.
        sessions: access tokens and refresh tokens.
        keys: API keys.
        library: vectors and behaviors.
    """

    database: Database
    users: Users
    sessions: Sessions
    keys: ApiKeys
    library: Library

    def close(self) -> None:
        """Lets go of the database and the files."""
        self.keys.close()
        self.library.close()
        self.database.close()


def open_store(
    settings: ServerSettings,
    *,
    clock: Callable[[], float] = time.time,
    passwords: Passwords | None = None,
) -> Store:
    """Opens the server's database and folders, and makes what isn't there.

    Args:
        settings: ``database``, the lifetimes of tokens, and how much one account may keep.
        clock: seconds since 1970.
        passwords: how passwords are hashed.

    Raises:
        ValidationError: a database that can't be named so.
        StorageError: a database that can't be opened or isn't ours, or a folder that can't be written.
    """
    home = mechanex_home()
    database = Database(settings.database or home / "server.sqlite")
    folder = home / "server"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        pending = Pending(folder / "pending", database.identity)
    except OSError as error:
        database.close()
        raise StorageError(
            f"{error.filename or home} can't be used ({error.strerror}): set MECHANEX_HOME to a folder that can "
            "be written."
        ) from error
    sessions = Sessions(
        database, settings.access_token_minutes * 60, settings.refresh_token_days * 86_400, clock
    )
    library = Library(
        database,
        VectorFiles(folder / "vectors"),
        BehaviorFiles(folder / "behaviors"),
        pending,
        clock,
        settings.max_vectors,
        settings.max_account_bytes,
    )
    store = Store(
        database,
        Users(database, passwords or Passwords(), sessions, clock),
        sessions,
        ApiKeys(database, clock),
        library,
    )
    try:
        library.settle()
    except BaseException:
        store.close()
        raise
    return store


def store_of(request: Request) -> Store:
    """The store of the application that a request came to."""
    store: Store = request.app.state.store
    return store
