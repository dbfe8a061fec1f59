"""The steer op by clusters of blocks that share a row's columns, `csrc/cuda/steer_slices.cuh`.

For GPUs of compute capability 9.0, and measured on none so far: a backend of its own, which ``auto`` doesn't take. What
its kernel doesn't serve (no rank, several edits of a row, gates, float64, rows of more than 4,096 numbers, tables that
don't fit on chip) goes to the native kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mechanex.ops.edits import StackedEdits

from ..backend import Backend, Kernel
from . import edits, modules
from .edits import declines_steer, refuses_steer, refuses_steer_many

__all__ = ["BACKEND", "steer", "steer_many"]

_CAPABILITY = (9, 0)


def steer(
    hidden: Tensor, rows: Tensor | None, bias: Tensor | None, left: Tensor | None, right: Tensor | None
) -> Tensor:
    """As :func:`.edits.steer`."""
    return edits.on_gpu("steer_slices", hidden, rows, None, bias, left, right)


def steer_many(hidden: Tensor, rows: Tensor | None, strength: Tensor | None, table: StackedEdits) -> Tensor:
    """As :func:`.edits.steer_many`."""
    return edits.steer_many(hidden, rows, strength, table, one_edit="steer_slices")


def missing() -> str | None:
    """Why the kernels can't run here and what to do about it, or None."""
    reason = modules.missing_cuda()
    if reason is None and (found := torch.cuda.get_device_capability()) < _CAPABILITY:
        return (
            f"clusters need compute capability {'.'.join(map(str, _CAPABILITY))}, this device has "
            f"{'.'.join(map(str, found))}; choose auto or native"
        )
    return reason


BACKEND = Backend(
    "clusters",
    "compiled steer kernels for clusters of blocks (compute capability 9.0), not measured yet",
    ("cuda",),
    {
        "steer": Kernel(steer, refuses_steer, declines_steer),
        "steer_many": Kernel(steer_many, refuses_steer_many),
    },
    missing,
)
