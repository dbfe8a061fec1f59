"""A model without any steering of this library, whoever holds the handles."""

from __future__ import annotations

from torch import nn

from .models import adapter_for
from .models.adapter import ModelAdapter, exclusive
from .orthogonalize import put_back

__all__ = ["reset"]


def reset(model: nn.Module | ModelAdapter) -> None:
    """Removes every hook of this library and puts orthogonalized weights back; handles do nothing from then on.

    Waits until the engine, in another thread, is done with the model. A user's own hooks stay.
    """
    adapter = adapter_for(model)
    with exclusive(adapter):
        adapter.detach_all()
        put_back(adapter)
