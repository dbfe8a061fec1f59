"""The files of accounts' steering vectors: whole and on the disk once saved, and those used lately kept in memory."""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import MechanexError, NotFoundError
from .database import StorageError

if TYPE_CHECKING:
    from ...engine.vectors import SteeringVector

__all__ = ["VectorFiles"]

_logger = logging.getLogger(__name__)

_CACHED = 64
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class VectorFiles:
    """Vectors by id, one file each. Methods block; any thread may call them.

    Args:
        folder: where the files are.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._cache: OrderedDict[str, SteeringVector] = OrderedDict()
        self._lock = threading.Lock()

    def save(self, vector_id: str, vector: SteeringVector) -> None:
        """Writes a vector's file.

        Raises:
            StorageError: it can't be written; nothing is left of it then.
        """
        try:
            vector.save(self._path(vector_id))
            _flush_folder(self._folder)
        except OSError as error:
            _logger.error("steering vector can't be kept in %s: %s", self._folder, error)
            self.remove(vector_id)
            raise StorageError(
                f"the steering vector can't be kept: {error.strerror or error} on the server.",
                507 if error.errno in _FULL else 500,
            ) from error
        self._remember(vector_id, vector)

    def load(self, vector_id: str) -> SteeringVector:
        """The vector with this id, which must have been saved.

        Raises:
            StorageError: its file is missing or damaged.
        """
        with self._lock:
            if vector_id in self._cache:
                self._cache.move_to_end(vector_id)
                return self._cache[vector_id]
        from ...engine.vectors import SteeringVector

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

    def remove(self, vector_id: str) -> None:
        """Deletes a vector's file; one that can't be deleted stays, and belongs to nobody."""
        with self._lock:
            self._cache.pop(vector_id, None)
        try:
            self._path(vector_id).unlink(missing_ok=True)
        except OSError as error:
            _logger.warning("the file of steering vector %s can't be deleted: %s", vector_id, error)

    def _remember(self, vector_id: str, vector: SteeringVector) -> None:
        with self._lock:
            self._cache[vector_id] = vector
            while len(self._cache) > _CACHED:
                self._cache.popitem(last=False)

    def _path(self, vector_id: str) -> Path:
        return self._folder / f"{vector_id}.safetensors"


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
