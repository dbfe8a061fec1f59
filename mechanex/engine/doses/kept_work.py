"""What a sweep has done so far, in a file, so that one that was interrupted goes on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import ValidationError
from ...home import atomic_path
from ..models.adapter import ModelAdapter
from ..ranks import current_ranks
from ..vectors import SteeringVector

__all__ = ["KeptWork"]

Numbers = dict[str, list[float]]


class KeptWork:
    """Results by name, of forced rounds and of texts.

    Args:
        path: the file; None keeps nothing.
        adapter: the model.
        vectors: what the doses are of.
        others: whatever else the results hang on, as JSON takes it.

    Raises:
        ValidationError: the file is of something else.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        adapter: ModelAdapter,
        vectors: Mapping[str, SteeringVector],
        others: Sequence[Any],
    ) -> None:
        self._path = None if path is None else Path(path)
        digest = hashlib.blake2b(digest_size=16)
        digest.update(json.dumps([adapter.model_id, list(others)], default=str).encode())
        for method, vector in vectors.items():
            digest.update(method.encode())
            for layer, direction in vector.items():
                # What a pass gives differs in its last bits from one run to another.
                digest.update(f"{layer}:{float(direction.norm()):.4g}".encode())
        self._of = digest.hexdigest()
        self._forced: dict[str, Numbers] = {}
        self._written: Numbers = {}
        # All processes go on from what the first one finds.
        text = current_ranks(None).from_first(self._text)
        if text is not None:
            self._read(text)

    def _text(self) -> str | None:
        """What the file holds; None where there is none."""
        if self._path is None or not self._path.exists():
            return None
        return self._path.read_text(encoding="utf-8", errors="replace")

    def _read(self, text: str) -> None:
        path = self._path
        try:
            found = json.loads(text)
            of, self._forced, self._written = found["of"], found["forced"], found["written"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValidationError(f"{path} is no checkpoint of a sweep: name another file.") from error
        if of != self._of:
            raise ValidationError(
                f"{path} is the checkpoint of another sweep (other data, model, prompts or seed): name another file."
            )

    def forced(self, number: int) -> Numbers:
        """Results of a forced round, to be read and added to."""
        return self._forced.setdefault(str(number), {})

    def written(self) -> Numbers:
        """Results of texts, likewise."""
        return self._written

    def save(self) -> None:
        """Writes the file, whole or not at all."""
        if self._path is None or not current_ranks(None).first:
            return
        with atomic_path(self._path) as temporary:
            Path(temporary).write_text(
                json.dumps({"of": self._of, "forced": self._forced, "written": self._written}),
                encoding="utf-8",
            )
