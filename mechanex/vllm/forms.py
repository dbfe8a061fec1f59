"""How layers take the residual stream: as one tensor, or as two whose sum it is. Told by calling them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ValidationError

__all__ = ["LayerCall", "takes_two"]


@dataclass(frozen=True)
class LayerCall:
    """What a layer was called with, when its model read some tokens.

    Args:
        args, kwargs: of its ``forward``.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def places(self, width: int) -> list[int | str]:
        """Where it holds tensors that are shaped like the stream."""
        return [place for place, given in self._given() if _is_stream(given, width)]

    def open_places(self) -> list[int | str]:
        """Where it holds None."""
        return [place for place, given in self._given() if given is None]

    def given(self, place: int | str) -> Any:
        """What it holds there; None where there is no such place."""
        return dict(self._given()).get(place)

    def with_at(self, place: int | str, value: Tensor) -> LayerCall:
        """The same call with another tensor somewhere."""
        if isinstance(place, str):
            return LayerCall(self.args, self.kwargs | {place: value})
        return LayerCall((*self.args[:place], value, *self.args[place + 1 :]), self.kwargs)

    def _given(self) -> list[tuple[int | str, Any]]:
        return [*enumerate(self.args), *self.kwargs.items()]


@torch.no_grad()
def takes_two(layers: Sequence[nn.Module], calls: Sequence[LayerCall], width: int) -> list[bool]:
    """For each layer whether it takes the stream as the sum of two tensors.

    Then what is NaN in the second one is NaN in the second that it gives; some are handed one and don't read it.

    Args:
        layers: those of one model, in order, which can be called.
        calls: how the model calls each of them.
        width: d_model.

    Raises:
        ValidationError: a layer is handed more than two such tensors, or none.
    """
    several = [call.places(width)[1:] for call in calls]
    for layer, call in zip(layers, calls, strict=True):
        n = len(call.places(width))
        if not 1 <= n <= 2:
            raise ValidationError(
                f"{type(layer).__name__} is handed {n} tensors that are {width} wide, and the residual stream is one, "
                "or the sum of two: this model can't be steered in vLLM."
            )
    found = []
    for layer, call, own in zip(layers, calls, several, strict=True):
        # The model's first layer is handed no second tensor yet, where the others are.
        second = own or next((places for places in several if places), [])
        if not second and len(layers) == 1 and _is_stream(_second(layer, call, width), width):
            second = call.open_places()
        found.append(any(_spreads(layer, call, width, place) for place in second))
    return found


def _second(layer: nn.Module, call: LayerCall, width: int, unknown: int | str | None = None) -> Any:
    """The second thing that a layer gives of zeros, and of what is NaN at a place."""
    # Fresh tensors: layers may write into what they are handed.
    (first, *_) = call.places(width)
    asked = call.with_at(first, torch.zeros_like(call.given(first)))
    if unknown is not None:
        asked = asked.with_at(unknown, torch.full_like(call.given(first), float("nan")))
    out = layer(*asked.args, **asked.kwargs)
    return out[1] if isinstance(out, tuple) and len(out) > 1 else None


def _spreads(layer: nn.Module, call: LayerCall, width: int, place: int | str) -> bool:
    given = _second(layer, call, width, place)
    return isinstance(given, Tensor) and bool(given.isnan().all())


def _is_stream(given: Any, width: int) -> bool:
    return isinstance(given, Tensor) and given.is_floating_point() and given.shape[-1] == width
