"""The files of accounts' vectors and behaviors: whole and on the disk once saved, those used lately kept in memory."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
import time
from abc import ABC, abstractmethod
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

from ...errors import MechanexError, NotFoundError
from .database import StorageError

if TYPE_CHECKING:
    from ...engine.sae.autoencoder import SparseAutoencoder
    from ...engine.sae.behavior import Behavior
    from ...engine.vectors import SteeringVector

__all__ = ["BehaviorFiles", "VectorFiles", "storage_error"]

T = TypeVar("T")

_logger = logging.getLogger(__name__)

_CACHED = 64
_LONG_AGO = 86_400.0  # seconds
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class _Files(ABC, Generic[T]):
    """Things by id, one file each. Methods block; any thread may call them.

    Args:
        folder: where the files are.
    """

    kind: str

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._cache: OrderedDict[str, T] = OrderedDict()
        self._lock = threading.Lock()

    def save(self, file_id: str, thing: T) -> None:
        """Writes a thing's file.

        Raises:
            StorageError: it can't be written; nothing is left of it then.
        """
        try:
            self._write(thing, self._path(file_id))
            _flush_folder(self._folder)
        except OSError as error:
            _logger.error("%s can't be kept in %s: %s", self.kind, self._folder, error)
            self.remove(file_id)
            raise storage_error(f"the {self.kind} can't be kept", error) from error
        self._remember(file_id, thing)

    def load(self, file_id: str) -> T:
        """The thing with this id, which must have been saved.

        Raises:
            StorageError: its file is missing or damaged.
        """
        with self._lock:
            if file_id in self._cache:
                self._cache.move_to_end(file_id)
                return self._cache[file_id]
        try:
            thing = self._read(self._path(file_id))
        except (MechanexError, OSError) as error:
            _logger.error("%s %s can't be read: %s", self.kind, file_id, error)
            raise StorageError(
                f"the file of {self.kind} {file_id!r} is {_defect(error)} on the server: make the "
                f"{self.kind.split()[-1]} again, or have the operator restore it.",
                500,
            ) from error
        return self._remember(file_id, thing)

    def remove(self, file_id: str) -> None:
        """Deletes a thing's file; one that can't be deleted stays, and belongs to nobody."""
        with self._lock:
            self._cache.pop(file_id, None)
        try:
            self._path(file_id).unlink(missing_ok=True)
        except OSError as error:
            _logger.warning("the file of %s %s can't be deleted: %s", self.kind, file_id, error)

    def size(self, file_id: str) -> int:
        """Bytes of a thing's file; 0 where there is none."""
        try:
            return self._path(file_id).stat().st_size
        except OSError:
            return 0

    def sweep(self, file_id: str, *, keep: bool) -> None:
        """Deletes what a server that was killed has left of a thing: half a file, and the whole one unless ``keep``."""
        for path in self._folder.glob(f"*{file_id}*"):
            if not (keep and path == self._path(file_id)):
                self._unlink(path)

    def sweep_old(self) -> None:
        """Deletes half files that nobody writes any more."""
        for path in self._folder.glob(".*.tmp"):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > _LONG_AGO:
                    self._unlink(path)

    def _unlink(self, path: Path) -> None:
        try:
            path.unlink(missing_ok=True)
            _logger.info("%s, which a server that was killed has left, is deleted", path)
        except OSError as error:
            _logger.warning("%s can't be deleted: %s", path, error)

    @abstractmethod
    def _write(self, thing: T, path: Path) -> None: ...

    @abstractmethod
    def _read(self, path: Path) -> T: ...

    def _remember(self, file_id: str, thing: T) -> T:
        """Keeps what was read, or what another thread read before: rows share what is one object."""
        with self._lock:
            thing = self._cache.setdefault(file_id, thing)
            while len(self._cache) > _CACHED:
                self._cache.popitem(last=False)
        return thing

    def _path(self, file_id: str) -> Path:
        return self._folder / f"{file_id}.safetensors"


class VectorFiles(_Files["SteeringVector"]):
    """Steering vectors."""

    kind = "steering vector"

    def _write(self, thing: SteeringVector, path: Path) -> None:
        thing.save(path)

    def _read(self, path: Path) -> SteeringVector:
        from ...engine.vectors import SteeringVector

        return SteeringVector.load(path)


class BehaviorFiles(_Files["Behavior"]):
    """What watches for behaviors."""

    kind = "behavior"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._saes: dict[str, SparseAutoencoder] = {}

    def _write(self, thing: Behavior, path: Path) -> None:
        from ...engine.sae.store import write_behavior

        write_behavior(thing, path)

    def _read(self, path: Path) -> Behavior:
        from ...engine.sae.store import read_behavior

        if not path.exists():
            raise NotFoundError(f"{path} is not there.")
        return read_behavior(path, self._saes)


def storage_error(what: str, error: OSError) -> StorageError:
    """What a client is told of a file that can't be written."""
    status = 507 if error.errno in _FULL else 500
    return StorageError(f"{what}: {error.strerror or error} on the server.", status)


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
