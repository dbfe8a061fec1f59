"""Activations in files: shards of safetensors with an index, written whole or not at all, read as memory maps."""

from __future__ import annotations

import bisect
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
from numpy.lib.mixins import NDArrayOperatorsMixin
from safetensors.numpy import save_file

from ..errors import MechanexError, NotFoundError, ValidationError
from ..home import atomic_path

__all__ = ["FORMAT", "Array", "Shards", "StoredRows", "opened"]

Array = numpy.ndarray[Any, Any]

FORMAT = "mechanex activations 1"
INDEX = "index.json"
# A shard ends with the text that fills it: so much is lost where a process is killed.
SHARD_TOKENS = 1 << 14
SHARD_BYTES = 1 << 28
_SHARD = re.compile(r"activations-\d{5}-of-\d{5}\.safetensors")


class StoredRows(NDArrayOperatorsMixin):
    """[n, d_model] numbers in the memory maps of files, in order; an array wherever numpy is given it.

    Indexing reads what is asked for: a row, a slice, or rows by a list of their numbers or a mask.

    Args:
        parts: the memory maps, at least one.
    """

    def __init__(self, parts: Sequence[Array]) -> None:
        self._parts = list(parts)
        self._ends = numpy.cumsum([len(part) for part in parts]).tolist()
        self.dtype = parts[0].dtype
        self.shape = (self._ends[-1], *parts[0].shape[1:])
        self.ndim = len(self.shape)

    def __len__(self) -> int:
        return int(self.shape[0])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        if copy is False:
            raise ValueError("activations in files lie in parts: an array of all of them is a copy.")
        return numpy.asarray(numpy.concatenate(self._parts), dtype=dtype)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        if any(isinstance(one, StoredRows) for one in options.get("out", ())):
            raise TypeError(
                "activations in files are read only: write to an array, such as numpy.asarray(…) of them."
            )
        read = [numpy.asarray(one) if isinstance(one, StoredRows) else one for one in inputs]
        return getattr(ufunc, method)(*read, **options)

    def __getitem__(self, key: Any) -> Array:
        if isinstance(key, tuple) and len(key) == 2 and isinstance(key[0], (slice, int, numpy.integer)):
            rows = self[key[0]]
            return rows[(slice(None), key[1])] if isinstance(key[0], slice) else rows[key[1]]
        if isinstance(key, tuple) or key is None or key is Ellipsis:
            # What combines both axes, as numpy does it; it reads all of them.
            found: Array = numpy.asarray(self)[key]
            return found
        if isinstance(key, slice):
            begin, end, step = key.indices(len(self))
            if step == 1:
                return self._between(begin, max(begin, end))
            return self[numpy.arange(begin, end, step)]
        numbers = numpy.asarray(key)
        if numbers.dtype == bool:
            if numbers.shape != (len(self),):
                raise IndexError(f"a mask has {len(self)} entries; got {numbers.shape}.")
            numbers = numbers.nonzero()[0]
        if numbers.dtype.kind not in "iu" and numbers.size:
            raise IndexError(f"rows are picked by whole numbers, a slice or a mask; got {key!r}.")
        if numbers.ndim == 0:
            return self._row(int(numbers))
        picked = [self._row(int(number)) for number in numbers.ravel()]
        found = numpy.stack(picked) if picked else numpy.empty((0, *self.shape[1:]), self.dtype)
        return found.reshape(*numbers.shape, *self.shape[1:])

    def __iter__(self) -> Iterator[Array]:
        for part in self._parts:
            yield from part

    def __repr__(self) -> str:
        return f"StoredRows({self.shape}, {self.dtype}, in {len(self._parts)} files)"

    def _row(self, number: int) -> Array:
        place = number + len(self) if number < 0 else number
        if not 0 <= place < len(self):
            raise IndexError(f"row {number} of {len(self)}.")
        part = bisect.bisect_right(self._ends, place)
        row: Array = self._parts[part][place - (self._ends[part - 1] if part else 0)]
        return row

    def _between(self, begin: int, end: int) -> Array:
        first, found = 0, []
        for part, last in zip(self._parts, self._ends, strict=True):
            if first < end and begin < last:
                found.append(part[max(0, begin - first) : end - first])
            first = last
        if len(found) == 1:
            return found[0]
        return numpy.concatenate(found) if found else numpy.empty((0, *self.shape[1:]), self.dtype)


@dataclass(frozen=True)
class Shards:
    """How activations are spread over files.

    Args:
        folder: where.
        layers: ascending.
        width: of a row.
        dtype: of the numbers, by numpy's name.
        lengths: rows of each text.
        bounds: the first text of each shard, and at the end the number of texts.
    """

    folder: Path
    layers: tuple[int, ...]
    width: int
    dtype: str
    lengths: tuple[int, ...]
    bounds: tuple[int, ...]

    @classmethod
    def planned(
        cls,
        folder: Path,
        layers: Sequence[int],
        width: int,
        dtype: str,
        lengths: Sequence[int],
        tokens: Sequence[int],
    ) -> Shards:
        """Shards of texts with so many rows and so many tokens each; the same whatever number of processes write."""
        row = width * numpy.dtype(dtype).itemsize * len(layers)
        bounds, size, read = [0], 0, 0
        for text, (n, m) in enumerate(zip(lengths, tokens, strict=True)):
            size, read = size + n * row, read + m
            if (size >= SHARD_BYTES or read >= SHARD_TOKENS) and text + 1 < len(lengths):
                bounds.append(text + 1)
                size = read = 0
        return cls(folder, tuple(layers), width, dtype, tuple(lengths), (*bounds, len(lengths)))

    @property
    def size(self) -> int:
        """How many there are."""
        return len(self.bounds) - 1

    def texts(self, shard: int) -> range:
        """The numbers of a shard's texts."""
        return range(self.bounds[shard], self.bounds[shard + 1])

    def path(self, shard: int) -> Path:
        """The file of a shard."""
        return self.folder / f"activations-{shard + 1:05d}-of-{self.size:05d}.safetensors"

    def missing(self) -> list[int]:
        """Those that aren't there yet."""
        return [shard for shard in range(self.size) if not self.path(shard).is_file()]

    def begin(self, facts: Mapping[str, Any]) -> list[int]:
        """Goes on in a folder where the same job was stopped, or empties it of what an earlier one wrote.

        Args:
            facts: what the numbers hang on, as JSON has it; ``"probe"`` are numbers that may differ by rounding.

        Returns:
            The shards that are to be written.

        Raises:
            ValidationError: the folder is a file, or holds another program's index.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise ValidationError(
                f"out is a folder, and {self.folder} is or lies in a file: name another."
            ) from None
        index = self._index()
        for path in self.folder.glob(".activations-*.safetensors.*.tmp"):  # of a process that was killed
            path.unlink(missing_ok=True)
        missing = self.missing()
        if missing and self._goes_on(index, facts):
            return missing
        (self.folder / INDEX).unlink(missing_ok=True)
        for path in self.folder.glob("activations-*.safetensors"):
            if _SHARD.fullmatch(path.name):
                path.unlink(missing_ok=True)
        index = {
            "format": FORMAT,
            **facts,
            "layers": self.layers,
            "width": self.width,
            "dtype": self.dtype,
            "bounds": self.bounds,
            "lengths": self.lengths,
        }
        with atomic_path(self.folder / INDEX) as temporary:
            temporary.write_text(json.dumps(index) + "\n", encoding="utf-8")
        return list(range(self.size))

    def _index(self) -> dict[str, Any]:
        """What an earlier call has written; empty where there is nothing."""
        path = self.folder / INDEX
        if not path.exists():
            return {}
        try:
            index = json.loads(path.read_text(encoding="utf-8"))
            if index["format"] == FORMAT:
                return dict(index)
        except (OSError, ValueError, TypeError, KeyError):
            pass
        raise ValidationError(
            f"{path} is another program's file, which would be written over: name another folder."
        )

    def _goes_on(self, index: dict[str, Any], facts: Mapping[str, Any]) -> bool:
        mine = {**facts, "format": FORMAT, "layers": list(self.layers), "bounds": list(self.bounds)}
        mine |= {"width": self.width, "dtype": self.dtype, "lengths": list(self.lengths)}
        probe, known = mine.pop("probe"), index.pop("probe", None)
        if index != mine or numpy.shape(known) != numpy.shape(probe):
            return False
        return numpy.allclose(known, probe, 1e-3, 1e-3 * float(numpy.abs(probe).max()))

    def write(self, shard: int, rows: Mapping[int, Array]) -> None:
        """Writes one, whole or not at all."""
        with atomic_path(self.path(shard)) as temporary:
            save_file({f"layer_{layer}": rows[layer] for layer in self.layers}, temporary)

    def arrays(self) -> dict[int, StoredRows]:
        """By layer, what was written."""
        maps = []
        for shard in range(self.size):
            path, rows = self.path(shard), sum(self.lengths[i] for i in self.texts(shard))
            found = _maps(path)
            names = {f"layer_{layer}" for layer in self.layers}
            if not names <= found.keys() or any(found[name].shape != (rows, self.width) for name in names):
                raise MechanexError(f"{path} can't be read: it doesn't hold the rows that {INDEX} tells of.")
            maps.append(found)
        return {layer: StoredRows([one[f"layer_{layer}"] for one in maps]) for layer in self.layers}


def opened(folder: Path) -> Shards:
    """The shards in a folder.

    Raises:
        NotFoundError: there are none.
        ValidationError: some are missing, or the index isn't one.
    """
    if not (folder / INDEX).is_file():
        raise NotFoundError(f"{folder} holds no activations: give the folder that was named as out.")
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        if index["format"] != FORMAT:
            raise ValueError(index["format"])
        layers, lengths, bounds = (tuple(index[name]) for name in ("layers", "lengths", "bounds"))
        found = Shards(folder, layers, index["width"], index["dtype"], lengths, bounds)
        numbers = (*layers, *lengths, *bounds, found.width)
        if (
            not layers
            or not all(type(one) is int for one in numbers)
            or bounds[-1] != len(lengths)
            or not lengths
        ):
            raise ValueError("its numbers don't fit each other")
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ValidationError(f"{folder / INDEX} is no index of activations: {error}.") from error
    if missing := found.missing():
        raise ValidationError(
            f"{folder} is unfinished: {len(missing)} of {found.size} shards are missing. Make the call that wrote it "
            "again, and it goes on from there."
        )
    return found


def _maps(path: Path) -> dict[str, Array]:
    """The tensors of a safetensors file, as maps of it."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        kinds = {"F32": numpy.float32, "F64": numpy.float64}
        return {
            name: _map(path, kinds[one["dtype"]], 8 + length + one["data_offsets"][0], tuple(one["shape"]))
            for name, one in header.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise MechanexError(f"{path} can't be read: {error or type(error).__name__}") from error


def _map(path: Path, dtype: Any, offset: int, shape: tuple[int, ...]) -> Array:
    if 0 in shape:
        return numpy.empty(shape, dtype)
    return numpy.memmap(path, dtype, "r", offset, shape)
