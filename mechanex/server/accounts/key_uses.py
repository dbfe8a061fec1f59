"""When API keys were used last: noted together, later, and not at all where the database can't be written."""

from __future__ import annotations

import logging
import threading

from sqlalchemy import bindparam, update

from ..library.database import Database, StorageError
from ..library.schema import api_keys

__all__ = ["KeyUses"]

_logger = logging.getLogger(__name__)

_TOGETHER = 1.0  # seconds in which uses are gathered before they are written
_CLOSING = 2.0  # seconds that the last ones have


class KeyUses:
    """Uses of keys that are on their way into the database; nobody who uses a key waits for that.

    Args:
        database: where they are written.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._lock = threading.Lock()
        self._noted: dict[str, float] = {}
        self._writer: threading.Thread | None = None
        self._closing = threading.Event()

    def note(self, key_id: str, at: float) -> None:
        """Notes a use, in seconds since 1970."""
        with self._lock:
            self._noted[key_id] = at
            if self._writer is None and not self._closing.is_set():
                self._writer = threading.Thread(target=self._write, name="mechanex-key-uses", daemon=True)
                self._writer.start()

    def latest(self, key_id: str, written: float | None) -> float | None:
        """The last use of a key, given that which the database has."""
        with self._lock:
            return self._noted.get(key_id, written)

    def close(self) -> None:
        """Writes what is noted, if that can be done soon; later uses are not noted."""
        self._closing.set()
        writer = self._writer
        if writer is not None:
            writer.join(_CLOSING)

    def _write(self) -> None:
        while True:
            self._closing.wait(_TOGETHER)
            with self._lock:
                noted = dict(self._noted)
                if not noted:
                    self._writer = None
                    return
            try:
                with self._database.write() as connection:
                    connection.execute(
                        update(api_keys)
                        .where(api_keys.c.id == bindparam("key_id"))
                        .values(last_used=bindparam("at")),
                        [{"key_id": key_id, "at": at} for key_id, at in noted.items()],
                    )
            except StorageError as error:
                _logger.warning(
                    "the last uses of %d API keys couldn't be noted: %s", len(noted), error.message
                )
            with self._lock:
                for key_id, at in noted.items():
                    if self._noted.get(key_id) == at:
                        del self._noted[key_id]
