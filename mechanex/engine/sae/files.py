"""The files that autoencoders come in, read without trusting them: nothing is unpickled but by torch's safe reader."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from ...errors import MechanexError, NotFoundError, ValidationError
from ..given import as_finite

__all__ = [
    "Weights",
    "number",
    "read_json",
    "read_npz",
    "read_pickled",
    "read_safetensors",
    "switch",
    "text",
    "whole",
]

# The largest that are published have a million features of width 4,608 in float32, twice: 39 GB.
MAX_BYTES = 64 << 30
MAX_JSON = 16 << 20
MAX_TENSORS = 64
MAX_COUNT = 1 << 31


class Weights:
    """The tensors of a file, taken by name; what is missing is said with what is there.

    Args:
        path: the file.
        tensors: by name, on the CPU.
    """

    def __init__(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        self.path, self._tensors = path, tensors

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def get(self, *names: str) -> Tensor | None:
        """The first of these that is there, or None."""
        return next((self._tensors[name] for name in names if name in self._tensors), None)

    def take(self, *names: str) -> Tensor:
        """The first of these that is there.

        Raises:
            ValidationError: none is.
        """
        found = self.get(*names)
        if found is None:
            have = ", ".join(f"{name} {list(t.shape)}" for name, t in sorted(self._tensors.items())[:12])
            raise ValidationError(
                f"{self.path} has no tensor {' or '.join(names)}; it has {have or 'none'}. Is it whole, and of the "
                "format that its configuration says?"
            )
        return found

    def matrix(self, shape: tuple[int, int] | None, *names: str) -> Tensor:
        """A matrix of this shape, or of any for None, as ``take``; another shape is a ValidationError."""
        found = self.take(*names)
        if found.dim() != 2 or (shape is not None and tuple(found.shape) != shape):
            wanted = "a matrix is expected" if shape is None else f"its configuration says {list(shape)}"
            raise ValidationError(f"{names[0]} in {self.path} has shape {list(found.shape)}, and {wanted}.")
        return found


def read_json(path: Path) -> dict[str, Any]:
    """A configuration: one object.

    Raises:
        NotFoundError: there is no such file.
        ValidationError: it isn't a JSON object of sensible size.
    """

    def read() -> Any:
        if path.stat().st_size > MAX_JSON:
            raise ValueError(f"it has more than {MAX_JSON:,} bytes")
        return json.loads(path.read_text(encoding="utf-8-sig"))

    found = _guarded(path, "JSON", read)
    if not isinstance(found, dict):
        raise ValidationError(f"{path} holds a {type(found).__name__}, and a configuration is an object.")
    return found


def read_safetensors(path: Path) -> Weights:
    """The tensors of a safetensors file; errors as in ``read_json``."""

    def read() -> dict[str, Tensor]:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            if len(names) > MAX_TENSORS:
                raise ValueError(f"it has {len(names)} tensors, and an autoencoder has a few")
            return {name: file.get_tensor(name) for name in names}

    return Weights(path, _floats(path, _guarded(path, "safetensors", read)))


def read_npz(path: Path) -> Weights:
    """The arrays of a NumPy archive, no objects among them; errors as in ``read_json``."""

    def read() -> dict[str, Tensor]:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if len(members) > MAX_TENSORS:
                raise ValueError(f"it has {len(members)} members, and an autoencoder has a few")
            unpacked = sum(member.file_size for member in members)
            if unpacked > MAX_BYTES or unpacked > 1024 * max(path.stat().st_size, 1 << 16):
                raise ValueError(f"it unpacks to {unpacked:,} bytes")
        with np.load(path, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in arrays.files}
        if any(array.dtype.kind not in "fiu" for array in found.values()):
            raise ValueError("it holds something else than numbers")
        return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in found.items()}

    return Weights(path, _floats(path, _guarded(path, "NumPy", read)))


def read_pickled(path: Path) -> Weights:
    """The tensors of a file of ``torch.save``, by torch's reader that runs no code; errors as in ``read_json``."""

    def read() -> dict[str, Tensor]:
        try:
            found = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            # torch's own words advise to run the file's code.
            raise ValueError("it holds more than tensors, which only running its code would read") from error
        if not isinstance(found, Mapping) or not all(isinstance(name, str) for name in found):
            raise ValueError(f"it holds a {type(found).__name__}, and a state dict is expected")
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}

    return Weights(path, _floats(path, _guarded(path, "torch", read)))


def _guarded(path: Path, kind: str, read: Callable[[], Any]) -> Any:
    if not path.exists():
        raise NotFoundError(f"there is no file {path}: an autoencoder's folder holds it.")
    if not path.is_file():
        raise ValidationError(f"{path} is not a regular file.")
    if path.stat().st_size > MAX_BYTES:
        raise ValidationError(
            f"{path} has {path.stat().st_size:,} bytes, more than any autoencoder that is read."
        )
    try:
        return read()
    except MechanexError:
        raise
    # A parser that is handed a hostile file may fail in any way; each of them means the same to the caller.
    except Exception as error:
        problem = "it is nested too deeply" if isinstance(error, RecursionError) else str(error).strip()
        first = (problem or type(error).__name__).splitlines()[0]
        raise ValidationError(
            f"{path} is not a readable {kind} file ({first}): it is damaged, cut off or something else."
        ) from error


def _floats(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for name, tensor in tensors.items():
        if tensor.is_complex() or tensor.is_sparse or tensor.device.type != "cpu":
            raise ValidationError(f"{name} in {path} is no plain tensor of numbers.")
        found[name] = tensor.detach()
    return found


def whole(config: Mapping[str, Any], name: str, path: Path, default: int | None = None) -> int:
    """A count of a configuration, at least 1; anything else is a ValidationError."""
    value = config.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_COUNT:
        raise ValidationError(
            f"{name} in {path} is {_shown(value)}, and a whole number from 1 to {MAX_COUNT:,} is expected."
        )
    return value


def number(config: Mapping[str, Any], name: str, path: Path) -> float:
    """A finite number of a configuration; anything else is a ValidationError."""
    value = config.get(name)
    found = as_finite(value)
    if found is None:
        raise ValidationError(f"{name} in {path} is {_shown(value)}, and a finite number is expected.")
    return found


def switch(config: Mapping[str, Any], name: str, path: Path, default: bool) -> bool:
    """A yes or no of a configuration; anything else is a ValidationError."""
    value = config.get(name, default)
    if not isinstance(value, bool):
        raise ValidationError(f"{name} in {path} is {_shown(value)}, and true or false is expected.")
    return value


def text(config: Mapping[str, Any], name: str, path: Path) -> str | None:
    """A text of a configuration, or None where there is none; anything else is a ValidationError."""
    value = config.get(name)
    if value is not None and not isinstance(value, str):
        raise ValidationError(f"{name} in {path} is {_shown(value)}, and a text is expected.")
    return value or None


def _shown(value: object) -> str:
    return "missing" if value is None else repr(value)[:60]
