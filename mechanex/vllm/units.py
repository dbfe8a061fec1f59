"""What goes to the workers as bytes, edits of a vector or a behavior, and the hash by which requests name it."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load, save
from torch import Tensor

from ..engine.intervention import Edit
from ..engine.sae.behavior import Behavior
from ..engine.sae.store import read_behavior, write_behavior
from ..ops.gate import Gate

__all__ = ["Unit", "key_of", "packed", "packed_behavior", "unpacked", "unpacked_unit"]

Unit = Mapping[int, Edit] | Behavior

_GATE = ("kinds", "weight", "offset")


def packed(edits: Mapping[int, Edit]) -> bytes:
    """Edits by layer, none with a dense matrix, as safetensors; equal ones give equal bytes."""
    tensors: dict[str, Tensor] = {}
    for layer, edit in sorted(edits.items()):
        parts = {"bias": edit.bias, "left": edit.left, "right": edit.right}
        if edit.gate is not None:
            parts |= {f"gate.{name}": getattr(edit.gate, name) for name in _GATE}
        for name, tensor in parts.items():
            if tensor is not None:
                tensors[f"{layer}.{name}"] = tensor.detach().to("cpu").contiguous().clone()
    return save(tensors)


def unpacked(data: bytes) -> dict[int, Edit]:
    """The edits that ``packed`` made these bytes of."""
    layers: dict[int, dict[str, Tensor]] = {}
    for name, tensor in load(data).items():
        layer, _, part = name.partition(".")
        layers.setdefault(int(layer), {})[part] = tensor
    return {layer: _edit(parts) for layer, parts in sorted(layers.items())}


def packed_behavior(behavior: Behavior) -> bytes:
    """A behavior's file.

    Raises:
        ValidationError: it has none, as ``write_behavior`` says.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "behavior.safetensors"
        write_behavior(behavior, path)
        return path.read_bytes()


def unpacked_unit(data: bytes) -> Unit:
    """What ``packed`` or ``packed_behavior`` made these bytes of.

    Raises:
        MechanexError: a behavior whose autoencoder isn't there.
    """
    length = int.from_bytes(data[:8], "little")
    if "mechanex" not in (json.loads(data[8 : 8 + length]).get("__metadata__") or {}):
        return unpacked(data)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "behavior.safetensors"
        path.write_bytes(data)
        return read_behavior(path)


def key_of(data: bytes) -> str:
    """The hash of what is packed."""
    return hashlib.sha256(data).hexdigest()[:32]


def _edit(parts: Mapping[str, Tensor]) -> Edit:
    gate = Gate(*(parts[f"gate.{name}"] for name in _GATE)) if "gate.kinds" in parts else None
    return Edit(parts["bias"], parts.get("left"), parts.get("right"), gate=gate)
