"""A folder of vectors that the operator of a server lets every client use."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

from ...engine.formats.files import FORMATS
from ...engine.vectors import SteeringVector
from ...errors import APIError, NotFoundError, ValidationError

__all__ = ["SharedVectors"]

_logger = logging.getLogger(__name__)
_ID = re.compile(r"\w(?:[\w. -]{0,126}\w)?")


class SharedVectors:
    """Vector files of a folder by their names without suffix; a file that comes later is found when asked for.

    Args:
        folder: the folder; None for no vectors.

    Raises:
        NotFoundError: there is no such folder.
        ValidationError: a file that can't be read, or whose name can't be an id, or two with one name.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._known: dict[str, SteeringVector] = {}
        if folder is None:
            return
        if not folder.is_dir():
            raise NotFoundError(f"{folder} is no folder: --vectors names a folder of vector files.")
        for path in sorted(folder.iterdir()):
            if path.suffix.lower() in FORMATS:
                if not _ID.fullmatch(path.stem):
                    raise ValidationError(
                        f"{path.name!r} in {folder} can't be an id: rename the file, to letters, digits, '_', '-', '.' "
                        "and single words."
                    )
                if path.stem in self._known:
                    raise ValidationError(f"two files in {folder} are called {path.stem}: keep one.")
                self._known[path.stem] = SteeringVector.load(path)

    def __iter__(self) -> Any:
        return iter(self._known.items())

    def loaded(self, vector_id: str) -> SteeringVector | None:
        """The vector of this name if its file was read already; doesn't block."""
        return self._known.get(vector_id)

    def get(self, vector_id: str) -> SteeringVector | None:
        """The vector of this name, or None; blocks.

        Raises:
            APIError: its file can't be read.
        """
        if vector_id in self._known or self._folder is None or not _ID.fullmatch(vector_id):
            return self._known.get(vector_id)
        for suffix in FORMATS:
            path = self._folder / f"{vector_id}{suffix}"
            if path.is_file():
                try:
                    return self._known.setdefault(vector_id, SteeringVector.load(path))
                except (OSError, ValueError) as error:
                    _logger.error("%s can't be read: %s", path, error)
                    reason = str(error).replace(str(path), path.name)
                    raise APIError(
                        f"The server can't read its vector {vector_id!r}: {reason}", 500
                    ) from error
        return None
