"""Where a model computes: accelerate may keep weights elsewhere between calls, or spread layers over devices."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...errors import ValidationError

__all__ = ["execution_device", "on_one_device"]


def execution_device(model: nn.Module, part: nn.Module, weight: Tensor) -> torch.device:
    """The device on which ``part`` of the model computes.

    Args:
        model: the model.
        part: one of its modules.
        weight: a weight of the module.

    Raises:
        ValidationError: the module has no weights, and nothing brings them when it is called.
    """
    if weight.device.type != "meta":
        return weight.device
    for module in (part, *model.modules()):
        hook = getattr(module, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):
            device = getattr(one, "execution_device", None)
            if device is not None:
                return torch.device(device)
    raise ValidationError(
        f"The weights of {type(model).__name__} are on the meta device, which holds no numbers; load them, for example "
        "with from_pretrained or to_empty and load_state_dict."
    )


def on_one_device(model: nn.Module) -> bool:
    """Whether all weights are at hand on one device."""
    devices = {weight.device for weight in model.parameters()}
    return len(devices) == 1 and torch.device("meta") not in devices
