"""Steering vectors on disk: which suffix means which format; files are read without trusting them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, deserialize
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from ...errors import MechanexError, NotFoundError, ValidationError
from ...home import atomic_path
from .record import CHECKSUM, check_record, own_checksum, with_checksum
from .site import Site, check_site, declared, layer_in, shift

__all__ = [
    "FORMATS",
    "MAX_BYTES",
    "TERMS",
    "Contents",
    "VectorFormat",
    "atomic_path",
    "format_of",
    "read_layers",
    "write_layers",
]

# A hundred layers of width 16,384 in float64 are 13 MB, as JSON 50: anything larger is another kind of file.
MAX_BYTES = 256 << 20

_LAYER = re.compile(r"0|[1-9][0-9]{0,5}")
TERMS = "terms"
"""The text field that says on which terms a vector acts."""
_MORE = "terms."  # begins the names of tensors that are no layers
_SAFETENSORS_DTYPES = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}

Layers = dict[int, Tensor]
Fields = dict[str, str]


@dataclass(frozen=True)
class Contents:
    """What is in a vector file.

    Args:
        layers: ``{number: tensor [d]}``, numbered as the file does.
        fields: its text fields.
        site: what its format or names say that the numbers mean, or None.
        unsaid: names of tensors whose numbers may mean either.
        more: its other tensors by name.
    """

    layers: Layers
    fields: Fields
    site: Site | None = None
    unsaid: tuple[str, ...] = ()
    more: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class VectorFormat:
    """One file format: ``read(path)`` gives what is in a file, ``write`` makes the file."""

    name: str
    read: Callable[[Path], Contents]
    write: Callable[[Path, Mapping[int, Tensor], Mapping[str, str], Mapping[str, Tensor]], None]


def read_layers(
    path: str | os.PathLike[str], site: Site | None = None
) -> tuple[Layers, Fields, dict[str, Tensor]]:
    """Reads a vector file of any known format; half precision comes back as float32, float64 stays.

    Args:
        path: the file; its suffix decides the format.
        site: what its numbers mean, where the file doesn't say it: the stream that enters a block, or its output.

    Returns:
        ``{layer: tensor [d]}``, finite, all of one width, in order of layers, the file's text fields, and its other
        tensors by name, of the same width.

    Raises:
        NotFoundError: there is no such file.
        ValidationError: unknown suffix, not a sound vector file, or a ``site`` that is missing or contradicts the
            file; names the file and the problem.
    """
    check_site(site)
    source = Path(path)
    chosen = format_of(source)
    if not source.exists():
        raise NotFoundError(f"no vector file at {source}: check the path.")
    if not source.is_file():
        raise ValidationError(f"{source} is not a regular file: give the path of a vector file.")
    size = source.stat().st_size
    if size > MAX_BYTES:
        raise ValidationError(
            f"{source} has {size:,} bytes, and a vector file has at most {MAX_BYTES:,}: is it a model's file?"
        )
    try:
        found = chosen.read(source)
        said = declared(found.fields.get("site")) if found.site is None else found.site
        more = shift(str(source), said, site, found.unsaid)
        layers = _checked({number + more: tensor for number, tensor in found.layers.items()})
        _check_more(found.more, next(iter(layers.values())).numel())
        check_record(layers, found.fields, found.more)
        return layers, found.fields, dict(found.more)
    except MechanexError:
        raise
    # A parser that is handed a hostile file may fail in any way; each of them means the same to the caller.
    except Exception as error:
        problem = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ValidationError(
            f"{source} is not a readable {chosen.name} vector file: {problem or type(error).__name__}"
        ) from error


def write_layers(
    path: str | os.PathLike[str],
    layers: Mapping[int, Tensor],
    fields: Mapping[str, str],
    more: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes a vector file in the format of its suffix; a half-written file never has the final name.

    Args:
        path: the file to make or replace; missing parent folders are made.
        layers: ``{layer: tensor [d]}``.
        fields: text fields to keep beside them (JSON drops them, but for the checksum).
        more: other tensors [d] by name, which safetensors alone hold.

    Raises:
        ValidationError: unknown suffix, or layers that the format can't hold.
    """
    target = Path(path)
    chosen = format_of(target)
    with atomic_path(target) as temporary:
        chosen.write(temporary, layers, fields, more or {})


def format_of(path: str | os.PathLike[str]) -> VectorFormat:
    """The format of a path's suffix; an unknown one is a ValidationError that lists the known ones."""
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        raise ValidationError(
            f"{os.fspath(path)!r} has the suffix {suffix!r}, which is no vector format: "
            f"use {', '.join(FORMATS)}."
        )
    return FORMATS[suffix]


def _checked(layers: Layers) -> Layers:
    if not layers:
        raise ValueError("it holds no layers")
    widths = {layer: tensor.numel() for layer, tensor in layers.items()}
    if len(set(widths.values())) > 1:
        raise ValueError(f"its layers have different widths: {widths}")
    for layer, tensor in layers.items():
        if tensor.numel() == 0:
            raise ValueError(f"layer {layer} is empty")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"layer {layer} holds NaN or infinite numbers")
    return dict(sorted(layers.items()))


def _check_more(more: Mapping[str, Tensor], width: int) -> None:
    for name, tensor in more.items():
        if tensor.numel() != width:
            raise ValueError(f"{name[:40]} is {tensor.numel()} wide, and its layers {width}")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name[:40]} holds NaN or infinite numbers")


def _layer_number(text: str) -> int:
    if not _LAYER.fullmatch(text):
        raise ValueError(f"{text[:40]!r} is no layer number (0, 1, 2, …)")
    return int(text)


def _read_safetensors(path: Path) -> Contents:
    data = path.read_bytes()
    try:
        entries = deserialize(data)  # type: ignore[no-untyped-call]
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    layers: Layers = {}
    more: dict[str, Tensor] = {}
    meanings: dict[str, Any] = {}
    for key, entry in entries:
        tensor = _tensor(key, entry)
        if key.startswith(_MORE):
            more[key.removeprefix(_MORE)] = tensor
            continue
        layer, meanings[key] = layer_in(key)
        if layer in layers:
            raise ValueError(f"layer {layer} is there twice")
        layers[layer] = tensor
    header_bytes = int.from_bytes(data[:8], "little")
    fields = json.loads(data[8 : 8 + header_bytes]).get("__metadata__") or {}
    texts = {str(key): str(value) for key, value in fields.items()}
    said = set(meanings.values())
    if len(said) > 1:
        raise ValueError(f"its tensors are named in several ways: {', '.join(meanings)[:100]}")
    if said == {None}:
        return Contents(
            layers, texts, unsaid=tuple(sorted(meanings, key=lambda key: layer_in(key)[0])), more=more
        )
    return Contents(layers, texts, None if said <= {"plain"} else said.pop(), more=more)


def _tensor(key: str, entry: Mapping[str, Any]) -> Tensor:
    """One vector [d] of a safetensors file, in float32 or float64."""
    if entry["dtype"] not in _SAFETENSORS_DTYPES:
        raise ValueError(f"{key[:40]} has dtype {entry['dtype']}; {', '.join(_SAFETENSORS_DTYPES)} are read")
    if any(size != 1 for size in entry["shape"][:-1]) or not entry["shape"]:
        raise ValueError(f"{key[:40]} has shape {entry['shape']}, and a vector has one dimension")
    if not entry["data"]:
        raise ValueError(f"{key[:40]} is empty")
    tensor = torch.frombuffer(bytearray(entry["data"]), dtype=_SAFETENSORS_DTYPES[entry["dtype"]])
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _write_safetensors(
    path: Path, layers: Mapping[int, Tensor], fields: Mapping[str, str], more: Mapping[str, Tensor]
) -> None:
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in more.items()}
    tensors = {f"layer.{layer}": tensor.detach().cpu().contiguous() for layer, tensor in layers.items()}
    tensors |= {_MORE + name: tensor for name, tensor in stored.items()}
    path.write_bytes(safetensors_bytes(tensors, metadata=with_checksum(layers, fields, stored)))


def _read_json(path: Path) -> Contents:
    found = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_without_duplicates)
    if not isinstance(found, dict):
        raise ValueError(f"the top level is a {type(found).__name__}, and {{layer: [numbers]}} is expected")
    checksum = found.pop(CHECKSUM, None)
    layers = {_layer_number(key): _json_vector(key, values) for key, values in found.items()}
    if checksum is None:
        return Contents(layers, {})
    # Only this library writes such a checksum, and it numbers the blocks that streams enter.
    return Contents(layers, {CHECKSUM: own_checksum(checksum)}, "input")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is there twice")
    return found


def _json_vector(key: str, values: object) -> Tensor:
    if not isinstance(values, list) or not all(type(value) in (int, float) for value in values):
        raise ValueError(f"layer {key} is not a flat list of numbers")
    return torch.tensor(values, dtype=torch.float64).float()


def _only_layers(fields: Mapping[str, str], more: Mapping[str, Tensor], kind: str) -> None:
    if more or TERMS in fields:
        raise ValidationError(
            f"{kind} keeps directions alone, and this vector acts on terms of its own (gates, a plane, a schedule or a "
            "condition): save it as .safetensors."
        )


def _write_json(
    path: Path, layers: Mapping[int, Tensor], fields: Mapping[str, str], more: Mapping[str, Tensor]
) -> None:
    _only_layers(fields, more, "JSON")
    stored = {layer: tensor.detach().cpu().float() for layer, tensor in layers.items()}
    lines = {str(layer): tensor.tolist() for layer, tensor in stored.items()}
    path.write_text(json.dumps(lines | with_checksum(stored, {}), allow_nan=False), encoding="utf-8")


def _read_gguf(path: Path) -> Contents:
    from .gguf import read_control_vector

    layers, fields = read_control_vector(path)
    return Contents(layers, fields, "output")


def _write_gguf(
    path: Path, layers: Mapping[int, Tensor], fields: Mapping[str, str], more: Mapping[str, Tensor]
) -> None:
    from .gguf import write_control_vector

    _only_layers(fields, more, "GGUF")
    write_control_vector(path, layers, fields)


FORMATS: dict[str, VectorFormat] = {
    ".safetensors": VectorFormat("safetensors", _read_safetensors, _write_safetensors),
    ".json": VectorFormat("JSON", _read_json, _write_json),
    ".gguf": VectorFormat("GGUF", _read_gguf, _write_gguf),
}
