"""What the server keeps: accounts in a database, their steering vectors in files beside it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from ...home import mechanex_home
from ..library.database import Database, StorageError
from ..library.files import VectorFiles
from ..library.records import Library
from .api_keys import ApiKeys
from .passwords import Passwords
from .tokens import AccessTokens, signing_secret
from .users import Accounts

if TYPE_CHECKING:
    from ...engine.vectors import SteeringVector
    from ..settings import Settings

__all__ = ["StorageError", "Store", "open_store"]


class Store:
    """Accounts and what belongs to them; every method blocks, and may be called from any thread.

    Args:
        database: where the rows are.
        accounts: sign-up and log-in.
        keys: API keys.
        library: vectors and behaviors.
    """

    def __init__(self, database: Database, accounts: Accounts, keys: ApiKeys, library: Library) -> None:
        self._database = database
        self.accounts = accounts
        self.keys = keys
        self.library = library

    def account_for_key(self, key: str) -> str | None:
        """The id of the account whose API key this is, or None."""
        return self.keys.account_for(key)

    def account_for_token(self, token: str) -> str | None:
        """The id of the account that an access token was given to, or None for a text that is none of ours.

        Raises:
            AuthenticationError: a token of ours that is expired or revoked.
        """
        return self.accounts.account_for_token(token)

    def vector(self, account_id: str | None, vector_id: str) -> SteeringVector | None:
        """The account's vector, or None: also for another account's.

        Raises:
            StorageError: its file is missing or damaged.
        """
        return self.library.vector(account_id, vector_id)

    def behavior_vector_id(self, account_id: str | None, name: str) -> str | None:
        """The id of the vector of the account's behavior, or None."""
        return self.library.behavior_vector_id(account_id, name)

    def close(self) -> None:
        """Lets go of the database."""
        self._database.close()


def open_store(
    settings: Settings,
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
        ValidationError: a database that can't be named so, or an unusable signing secret.
        StorageError: a database that can't be opened or isn't ours, or a folder that can't be written.
    """
    home = mechanex_home()
    database = Database(settings.database or home / "server.sqlite")
    try:
        folder = home / "server"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        tokens = AccessTokens(signing_secret(folder), settings.access_token_minutes * 60, clock)
        accounts = Accounts(
            database, passwords or Passwords(), tokens, settings.refresh_token_days * 86_400, clock
        )
    except OSError as error:
        database.close()
        raise StorageError(
            f"{error.filename or home} can't be used ({error.strerror}): set MECHANEX_HOME to a folder that can "
            "be written."
        ) from error
    except BaseException:
        database.close()
        raise
    library = Library(database, VectorFiles(folder / "vectors"), clock, settings.max_vectors)
    return Store(database, accounts, ApiKeys(database, clock), library)
