"""Ways to take a behavior out of an activation once it was seen there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .detectors import FeatureDetector

__all__ = ["WAYS", "Correction", "Way"]

Way = Literal["cap", "subtract", "clamp", "features"]
WAYS: tuple[Way, ...] = ("cap", "subtract", "clamp", "features")


@dataclass(frozen=True, eq=False)
class Correction:
    """What is done to an activation x of a token that shows a behavior.

    Args:
        way: ``"cap"``: its component along the direction is brought down to the level of negative examples, never up;
            ``"clamp"``: brought there from both sides; ``"subtract"``: lessened by the distance of positive and
            negative examples; ``"features"``: features that say more than in negative examples are brought down to what
            they say there, and x changes by what that changes in the reconstruction, whose error cancels.
        direction: [d], of norm 1.
        low, high: the component in negative and in positive examples.
        strength: 1; 2 for twice the distance of the examples, and so on.
        detector: of ``"features"``.
    """

    way: Way
    direction: Tensor
    low: float
    high: float
    strength: float = 1.0
    detector: FeatureDetector | None = None

    @property
    def level(self) -> float:
        """What a component is brought to."""
        return self.low - (self.strength - 1) * (self.high - self.low)

    def __call__(self, x: Tensor) -> Tensor:
        """[..., d] corrected activations, in x's dtype; x itself is left alone."""
        wide = x.float() if x.dtype != torch.float64 else x
        direction = self.direction.to(wide)
        if self.way == "features":
            return (wide + self._by_features(wide)).to(x.dtype)
        if self.way == "subtract":
            return (wide - self.strength * (self.high - self.low) * direction).to(x.dtype)
        over = (wide @ direction - self.level)[..., None]
        return (wide - (over.relu() if self.way == "cap" else over) * direction).to(x.dtype)

    def _by_features(self, x: Tensor) -> Tensor:
        """decode(clamped) − decode(as they are): only the directions of the features that are too loud."""
        found = self.detector
        assert found is not None
        flat = x.reshape(-1, x.shape[-1])
        prepared = found.sae.prepare(flat)
        said = found.values(flat)
        # Features that tell the behavior say too much above their level, those that speak against it too little.
        levels = found.levels.to(said)
        towards = found.weights.to(said) > 0
        wanted = torch.where(towards, torch.minimum(said, levels), torch.maximum(said, levels))
        change = self.strength * (wanted - said)
        decoder = found.sae.decoder[found.features.to(found.sae.decoder.device)]
        if found.sae.by_decoder_norm:
            change = change / decoder.norm(dim=1).clamp_min(torch.finfo(change.dtype).tiny)
        moved = change @ decoder.to(change)
        if prepared.size is not None:
            moved = moved * prepared.size
        return moved.view(x.shape).to(x.dtype)
