"""Named steering vectors: kept for the session, and on disk where another process finds them."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import MechanexError, NotFoundError, ValidationError
from ..home import vectors_folder
from ..launched import global_rank
from .formats.files import FORMATS
from .models import adapter_for
from .models.adapter import ModelAdapter
from .vectors import SteeringVector

__all__ = ["VectorStore"]

_logger = logging.getLogger(__name__)
_SHORTEST = 4  # letters that stand for an id
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


class VectorStore:
    """Vectors by id.

    Args:
        folder: where the files are; by default ``vectors`` under ``MECHANEX_HOME``, looked up at each call.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._session: dict[str, SteeringVector] = {}

    def put(self, vector: SteeringVector) -> str:
        """Stores a vector and returns its new id; if the folder can't be written, for this session only."""
        # Processes that share a job have the same vector, and give it the same id.
        vector_id = uuid.uuid4().hex if global_rank() is None else vector.digest().hex()
        try:
            vector.save(self.path(vector_id))
        except OSError as error:
            _logger.warning(
                "vector %s stays in this session only: %s can't be written (%s); set MECHANEX_HOME elsewhere",
                vector_id,
                self.path(vector_id),
                error,
            )
        self._session[vector_id] = vector
        return vector_id

    def get(self, vector_id: str) -> SteeringVector:
        """The vector with this id, of this session or an earlier one.

        Raises:
            NotFoundError: there is none.
            ValidationError: the text can't be an id, or its file is damaged.
        """
        path = self._path_of(vector_id)
        if vector_id in self._session:
            return self._session[vector_id]
        if not path.exists():
            raise self._unknown(vector_id)
        return self._session.setdefault(vector_id, SteeringVector.load(path))

    def ids(self) -> list[str]:
        """The ids of all that are stored, the latest last."""
        folder = self._folder or vectors_folder()
        found: dict[str, float] = dict.fromkeys(self._session, 0.0)
        for path in folder.glob("*.safetensors") if folder.is_dir() else ():
            with contextlib.suppress(OSError):  # it was deleted just now
                if _ID.fullmatch(path.stem):
                    found[path.stem] = path.stat().st_mtime
        return sorted(found, key=lambda one: (found[one], one))

    def completed(self, text: str) -> str:
        """The only id of a stored vector that begins with a text of 4 letters or more; any other text as it is.

        Raises:
            ValidationError: several ids begin with it.
        """
        if text in self or len(text) < _SHORTEST or not _ID.fullmatch(text):
            return text
        files = (path.stem for path in self.path(text).parent.glob(f"{text}*.safetensors"))
        found = sorted({*files, *(one for one in self._session if one.startswith(text))})
        if len(found) > 1:
            raise ValidationError(
                f"{len(found)} stored vectors begin with {text!r} ({', '.join(found[:3])}, …): give more of the id."
            )
        return found[0] if found else text

    def delete(self, vector_id: str) -> None:
        """Deletes a vector, of this session or an earlier one.

        Raises:
            NotFoundError: there is none with this id.
            ValidationError: the text can't be an id.
            MechanexError: its file can't be deleted.
        """
        path = self._path_of(vector_id)
        if vector_id not in self._session and not path.exists():
            raise self._unknown(vector_id)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise MechanexError(f"{path} can't be deleted ({error.strerror}).") from error
        self._session.pop(vector_id, None)

    def resolve(
        self, source: str | os.PathLike[str] | Mapping[int, Any], model: nn.Module | ModelAdapter
    ) -> SteeringVector:
        """The vector that a user means by an id, a path, ``{layer: tensor, array or list}`` or a vector itself.

        Args:
            source: negative layers in a dict count from the model's end.
            model: the model that is to be steered.

        Raises:
            NotFoundError: a text that is neither the id of a stored vector nor an existing file.
            ValidationError: anything else, or unsound layers or files.
        """
        if isinstance(source, SteeringVector):
            return source
        if isinstance(source, Mapping):
            adapter = adapter_for(model)
            layers = {adapter.layer_index(layer): tensor for layer, tensor in source.items()}
            if len(layers) < len(source):
                raise ValidationError(f"a layer is named twice in {list(source)}: keep one.")
            return SteeringVector(layers)
        if source in self:
            return self.get(str(source))
        if not isinstance(source, (str, os.PathLike)):
            raise ValidationError(
                "steering_vector is an id, {layer: tensor}, a SteeringVector or a path; "
                f"got {type(source).__name__}."
            )
        if isinstance(source, os.PathLike) or Path(source).suffix.lower() in FORMATS or os.sep in source:
            return SteeringVector.load(source)
        raise NotFoundError(
            f"{source!r} is neither the id of a stored vector nor a vector file ({', '.join(FORMATS)}): "
            "use an id that generate_vectors returned, or a path."
        )

    def __contains__(self, vector_id: object) -> bool:
        return (
            isinstance(vector_id, str)
            and _ID.fullmatch(vector_id) is not None
            and (vector_id in self._session or self.path(vector_id).exists())
        )

    def _path_of(self, vector_id: object) -> Path:
        if not isinstance(vector_id, str) or not _ID.fullmatch(vector_id):
            raise ValidationError(
                f"{vector_id!r} is no vector id: ids have up to 64 letters, digits, '-' and '_'; "
                "generate_vectors returns one."
            )
        return self.path(vector_id)

    def _unknown(self, vector_id: str) -> NotFoundError:
        return NotFoundError(
            f"no steering vector has the id {vector_id!r}, neither in this session nor in "
            f"{self.path(vector_id).parent}: use an id that generate_vectors returned."
        )

    def path(self, vector_id: str) -> Path:
        """The file of a vector with this id, whether it is there or not."""
        return (self._folder or vectors_folder()) / f"{vector_id}.safetensors"
