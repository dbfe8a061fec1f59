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
    found = []
    for i, (layer, call) in enumerate(zip(layers, calls, strict=True)):
        places = call.places(width)
        if not 1 <= len(places) <= 2:
            raise ValidationError(
                f"{type(layer).__name__} is handed {len(places)} tensors that are {width} wide, and the residual "
                "stream is one, or the sum of two: this model can't be steered in vLLM."
            )
        # Not what was recorded, which layers may have written to since.
        hidden = torch.zeros_like(call.given(places[0]))
        unknown = torch.full_like(hidden, float("nan"))
        alone = call.with_at(places[0], hidden)
        # The first layer is handed no second tensor yet, where the others are.
        second = places[1:] or [
            place
            for place in (calls[i + 1].places(width)[1:] if i + 1 < len(calls) else call.open_places())
            if call.given(place) is None
        ]
        found.append(any(_spreads(layer, alone.with_at(place, unknown)) for place in second))
    return found


def _spreads(layer: nn.Module, call: LayerCall) -> bool:
    out = layer(*call.args, **call.kwargs)
    return isinstance(out, tuple) and isinstance(out[1], Tensor) and bool(out[1].isnan().all())


def _is_stream(given: Any, width: int) -> bool:
    return isinstance(given, Tensor) and given.is_floating_point() and given.shape[-1] == width
