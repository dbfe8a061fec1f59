"""Models whose weights are elsewhere between calls (accelerate's ``cpu_offload``, ``disk_offload``, ``device_map``).

All that is known of accelerate's own structures is here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ValidationError

__all__ = ["is_absent", "on_one_device", "where_it_runs"]


def is_absent(weight: Tensor) -> bool:
    """Whether a weight holds no numbers now: it is somewhere else, or nowhere."""
    return weight.device.type == "meta"


def on_one_device(model: nn.Module) -> bool:
    """Whether all weights are there, on one device."""
    weights = list(model.parameters())
    return len({weight.device for weight in weights}) == 1 and not is_absent(weights[0])


def where_it_runs(model: nn.Module, name: str) -> torch.device:
    """The device that a model without weights of its own computes on: its token ids go there.

    Args:
        model: the model; its embeddings are absent.
        name: what it is called in messages.

    Raises:
        ValidationError: nothing brings the weights when the model is called.
    """
    for module in model.modules():
        hook: Any = getattr(module, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):
            if getattr(one, "offload", False) and getattr(one, "execution_device", None) is not None:
                device = one.execution_device
                return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    raise ValidationError(
        f"The weights of {name} are on the meta device, and nothing loads them when it is called: load the model with "
        "its weights, or let accelerate offload it (accelerate.cpu_offload(model))."
    )
