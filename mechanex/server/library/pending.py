"""Notes of files that are being written or deleted, so that what a killed server has left can be told from the rest."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

__all__ = ["Pending"]

_logger = logging.getLogger(__name__)


class Pending:
    """The notes of one server. Beside them lies a file that it holds locked as long as it runs, however it ends.

    Several servers may have one folder, and databases of their own: a server looks only after those of its database
    that have ended. Methods block; any thread may call them.

    Args:
        folder: where the notes are.
        database: its name; rows there say which files belong to somebody.

    Raises:
        OSError: the folder can't be written.
    """

    def __init__(self, folder: Path, database: str) -> None:
        self._folder, self._database, self._server = folder, database, uuid.uuid4().hex
        folder.mkdir(parents=True, exist_ok=True)
        # It gets its name once it is locked: nobody takes this server for one that has ended.
        new, self._lock = folder / f"{self._server}.new", folder / f"{self._server}.lock"
        descriptor = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        self._held: int | None = descriptor
        os.write(descriptor, database.encode("utf-8", "surrogateescape"))
        _locked(descriptor)
        os.replace(new, self._lock)

    @contextlib.contextmanager
    def noted(self, *ids: str) -> Iterator[None]:
        """Keeps notes of these files while the block writes or deletes them and their rows."""
        notes = [self._folder / f"{self._server}.{one}" for one in ids]
        try:
            for note in notes:
                note.touch()
            yield
        finally:
            for note in notes:
                _remove(note)

    def settle(self, settle: Callable[[list[str]], None]) -> None:
        """Hands over the files that servers of this database left in the middle, and forgets the notes of them."""
        for lock in self._folder.glob("*.lock"):
            if lock == self._lock:
                continue
            try:
                descriptor = os.open(lock, os.O_RDWR)
            except OSError:
                continue  # another server has just looked after it
            try:
                if not _locked(descriptor):
                    continue
                if os.read(descriptor, 65536) != self._database.encode("utf-8", "surrogateescape"):
                    continue
                notes = list(self._folder.glob(f"{lock.stem}.{'[0-9a-f]' * 32}"))
                settle([note.suffix[1:] for note in notes])
                for note in (*notes, lock):
                    _remove(note)
            finally:
                os.close(descriptor)

    def close(self) -> None:
        """Ends the server's part, once; what is still being written stays noted for the next one."""
        if self._held is None:
            return
        os.close(self._held)
        self._held = None
        if not list(self._folder.glob(f"{self._server}.{'[0-9a-f]' * 32}")):
            _remove(self._lock)


def _locked(descriptor: int) -> bool:
    """Takes the lock of a file, which goes with the descriptor; False where another has it, or there are no locks."""
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        _logger.warning("%s can't be deleted: %s", path, error)
