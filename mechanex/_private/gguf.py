"""gguf: what its documentation doesn't name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np

__all__ = ["BoundedReader"]


class BoundedReader(gguf.GGUFReader):
    """The package's reader, which believes the lengths in a file, made to stop where the file does.

    Every read of the package goes through ``_get``, and ``data`` is the file's bytes.

    Args:
        path: the file.
        most_reads: reads after which the file counts as unsound.
        kind: what the file should be, for messages.
    """

    def __init__(self, path: Path, most_reads: int, kind: str) -> None:
        self._left, self._kind = most_reads, kind
        super().__init__(path)

    def _get(self, offset: Any, dtype: Any, count: Any = 1, override_order: Any = None) -> Any:
        self._left -= 1
        if self._left < 0:
            raise ValueError(f"it has too many fields for a {self._kind}")
        wanted = int(count) * np.dtype(dtype).itemsize
        if int(offset) + wanted > self.data.size:
            raise ValueError("it ends early, or a length in it is wrong")
        return super()._get(int(offset), dtype, int(count), override_order)
