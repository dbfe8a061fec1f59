"""Tensors, and models of them, that lie in several processes, each of which holds a part (tensor parallelism, FSDP)."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ValidationError

__all__ = ["check_whole", "is_sharded", "is_split", "of_this_process"]


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds a part of a tensor, and others the rest."""
    # Nobody has made a DTensor before its module was loaded, and to load it here would cost every user its time.
    module = sys.modules.get("torch.distributed.tensor")
    if module is None or not isinstance(tensor, module.DTensor):
        return False
    return not all(one.is_replicate() for one in tensor.placements)


def is_split(model: nn.Module) -> bool:
    """Whether some of a model's weights are sharded, so that a pass takes all processes."""
    distributed: Any = torch.distributed
    # To look through all weights takes as long as some layers of a pass, and only joined processes share any.
    if not (distributed.is_available() and distributed.is_initialized()):
        return False
    return any(map(is_sharded, model.parameters()))


def of_this_process(tensor: Tensor) -> Tensor:
    """The part that this process holds; the tensor itself where that is all."""
    parts: Any = tensor
    found: Tensor = parts.to_local() if is_sharded(tensor) else tensor
    return found


def check_whole(model: nn.Module, what: str) -> None:
    """Raises a ValidationError where a model is split and something needs all of it in one process.

    Args:
        model: the model.
        what: what needs it, to begin the message with.
    """
    if is_split(model):
        raise ValidationError(f"{what} of a model that is split over processes (tp=, FSDP): load it whole.")
