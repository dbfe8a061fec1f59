"""What a vector file says about itself, held against its tensors: a checksum, the width, and which layers there are."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["CHECKSUM", "FORMAT_VERSION", "TERMS_VERSION", "check_record", "own_checksum", "with_checksum"]

FORMAT_VERSION = "2"
"""The version that is written; files of version 1 have no checksum."""
TERMS_VERSION = "3"
"""The version of files that hold more than layers, which readers of the former would drop."""
_READ = ("1", FORMAT_VERSION, TERMS_VERSION)
CHECKSUM = "checksum"
_KIND = "sha256:"


def with_checksum(
    layers: Mapping[int, Tensor], fields: Mapping[str, str], more: Mapping[str, Tensor] | None = None
) -> dict[str, str]:
    """The fields with the checksum of all of them and of the layers.

    Args:
        layers: ``{layer: tensor [d]}`` as it is stored, float32 or float64.
        fields: text fields of the file.
        more: the file's other tensors by name.
    """
    return {**fields, CHECKSUM: _checksum(layers, fields, more or {})}


def own_checksum(found: object) -> str:
    """A checksum of ours, where a format has no other; raises a ValueError for anything else."""
    if not isinstance(found, str) or not found.startswith(_KIND):
        raise ValueError(
            "its checksum is of no kind that is known here: copy or save it again, or delete the entry"
        )
    return found


def check_record(
    layers: Mapping[int, Tensor], fields: Mapping[str, str], more: Mapping[str, Tensor] | None = None
) -> None:
    """Checks layers that were read against what the file says of them; other tools' files may say nothing.

    Raises:
        ValueError: a later format version, a flipped bit anywhere, or another width or other layers than the file
            says.
    """
    version = fields.get("format_version")
    if version is not None and version not in _READ:
        raise ValueError(
            f"it has format version {version[:20]!r}, and this library reads {', '.join(_READ)}: update mechanex, "
            "or save the vector again with this version"
        )
    found = fields.get(CHECKSUM)
    # A file without a version may be another tool's, with a checksum of another kind.
    ours = found is not None and found.startswith(_KIND)
    if version in (FORMAT_VERSION, TERMS_VERSION) and not ours:
        raise ValueError("its checksum is missing: the file was damaged or edited; copy or save it again")
    if ours and found != _checksum(layers, fields, more or {}):
        raise ValueError(
            "its checksum is not that of its content: the file was damaged or edited; copy or save it again"
        )
    if version is None:
        return
    width = {str(tensor.numel()) for tensor in layers.values()}
    if "width" in fields and {fields["width"]} != width:
        raise ValueError(
            f"its metadata says that vectors are {fields['width'][:20]} wide, and they are {', '.join(width)}"
        )
    numbers = ",".join(map(str, sorted(layers)))
    if "layers" in fields and fields["layers"] != numbers:
        raise ValueError(f"its metadata says layers {fields['layers'][:80]}, and it holds {numbers}")


def _checksum(layers: Mapping[int, Tensor], fields: Mapping[str, str], more: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in (*sorted(layers.items()), *sorted(more.items())):
        digest.update(f"{name}:{tensor.dtype}:{tensor.numel()};".encode())
        stored = tensor.detach().cpu().contiguous().view(torch.uint8).numpy()
        digest.update(stored.tobytes())
    named = sorted((name, text) for name, text in fields.items() if name != CHECKSUM)
    digest.update(json.dumps(named).encode())
    return _KIND + digest.hexdigest()
