"""Edits of one vector as bytes that go to the workers, and the hash of their content by which requests name them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from safetensors.torch import load, save
from torch import Tensor

from ..engine.intervention import Edit
from ..ops.gate import Gate

__all__ = ["key_of", "packed", "unpacked"]

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


def key_of(data: bytes) -> str:
    """The hash of packed edits."""
    return hashlib.sha256(data).hexdigest()[:32]


def _edit(parts: Mapping[str, Tensor]) -> Edit:
    gate = Gate(*(parts[f"gate.{name}"] for name in _GATE)) if "gate.kinds" in parts else None
    return Edit(parts["bias"], parts.get("left"), parts.get("right"), gate=gate)
