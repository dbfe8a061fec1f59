"""GGUF control vectors, through the ``gguf`` package.

Their ``direction.N`` acts on the output of layer N, which is the residual stream entering layer N + 1: our
layer L is their ``direction.(L-1)``.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from ..._private.gguf import BoundedReader
from ...errors import ValidationError
from .record import with_checksum

__all__ = ["read_control_vector", "write_control_vector"]

_logger = logging.getLogger(__name__)

ARCHITECTURE = "controlvector"
_DIRECTION = re.compile(r"direction\.(0|[1-9][0-9]{0,5})")
_FIELD_PREFIX = "mechanex."
_MODEL_HINT = "controlvector.model_hint"
_Type = gguf.GGMLQuantizationType
_FLOATS = (_Type.F32, _Type.F16, _Type.F64)
_INTEGERS = (_Type.I8, _Type.I16, _Type.I32, _Type.I64)
# A control vector of 100 layers takes about 2,000 reads.
_MAX_READS = 200_000


def read_control_vector(path: Path) -> tuple[dict[int, Tensor], dict[str, str]]:
    """Reads ``direction.N`` tensors by N, and the text fields that this library wrote.

    Quantized tensors are dequantized.

    Raises:
        ValueError: the file is no control vector, or is not sound; other exceptions may come from the parser.
    """
    reader = BoundedReader(path, _MAX_READS, "control vector")
    architecture = _text(reader, "general.architecture")
    if architecture not in (None, ARCHITECTURE):
        raise ValueError(f"its general.architecture is {architecture!r}, and {ARCHITECTURE!r} is expected")
    layers: dict[int, Tensor] = {}
    for tensor in reader.tensors:
        match = _DIRECTION.fullmatch(tensor.name)
        if not match:
            raise ValueError(f"tensor {tensor.name[:40]!r} is not named direction.0, direction.1, …")
        layers[int(match[1])] = _vector(tensor)
    fields = {
        name.removeprefix(_FIELD_PREFIX): _text(reader, name) or ""
        for name in reader.fields
        if name.startswith(_FIELD_PREFIX)
    }
    hint = _text(reader, _MODEL_HINT)
    if hint and not fields:
        fields["model"] = hint
    return layers, fields


def _vector(tensor: Any) -> Tensor:
    """[d] float32 of a tensor of the file, [d] or with leading axes of length 1."""
    kind = tensor.tensor_type
    values = None
    if kind in _FLOATS:
        values = np.array(tensor.data, dtype=np.float64)
    elif kind not in _INTEGERS:
        try:
            values = np.array(gguf.dequantize(tensor.data, kind), dtype=np.float64)
        except NotImplementedError:
            values = None
    # GGUF names the innermost axis first.
    shape = [int(size) for size in tensor.shape]
    if values is None or any(size != 1 for size in shape[1:]):
        raise ValueError(
            f"{tensor.name} is {kind.name} of shape {tuple(shape[::-1])}; a vector is expected, of F32, F16, F64 or a "
            "quantized type that the gguf package can read"
        )
    single: Tensor = torch.from_numpy(values.reshape(-1)).float()
    return single


def write_control_vector(path: Path, layers: Mapping[int, Tensor], fields: Mapping[str, str]) -> None:
    """Writes a control vector in float32, with this library's text fields under ``mechanex.``.

    Raises:
        ValidationError: layer 0 is there (the format has no name for it), or a number doesn't fit float32.
    """
    if 0 in layers:
        raise ValidationError(
            "layer 0 (the embeddings) can't be exported to GGUF, whose first site is the output of layer 0: "
            "save as .safetensors or .json, or drop layer 0."
        )
    if 1 in layers:
        _logger.warning("layer 1 is direction.0 in GGUF, and llama.cpp refuses to load files that have it")
    arrays = {layer: tensor.detach().cpu().float() for layer, tensor in sorted(layers.items())}
    for layer, array in arrays.items():
        if not torch.isfinite(array).all():
            raise ValidationError(f"layer {layer} doesn't fit GGUF's float32: scale the vector down.")
    fields = with_checksum(arrays, fields)
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    try:
        writer.add_string(_MODEL_HINT, fields.get("model_family", fields.get("model", "")))
        writer.add_uint32("controlvector.layer_count", len(arrays))
        for key, value in fields.items():
            # add_string would leave out an empty text.
            writer.add_key_value(_FIELD_PREFIX + key, value, gguf.GGUFValueType.STRING)
        for layer, array in arrays.items():
            writer.add_tensor(f"direction.{layer - 1}", array.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _text(reader: gguf.GGUFReader, name: str) -> str | None:
    field = reader.get_field(name)
    if field is None:
        return None
    if field.types != [gguf.GGUFValueType.STRING]:
        raise ValueError(f"its field {name} is not text")
    return bytes(field.parts[-1]).decode("utf-8")
