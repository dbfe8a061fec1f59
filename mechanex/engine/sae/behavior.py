"""A behavior: what detects it, from which score on, what corrects it, and the figures that were measured of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from .corrections import Correction
from .detectors import Detector, FeatureDetector, ProbeDetector
from .hook_points import HookPoint

__all__ = ["Behavior"]


@dataclass(frozen=True, eq=False)
class Behavior:
    """A behavior of a model.

    Args:
        name: what it is called by.
        description: for people.
        model: id of the model that it is of.
        family: that model's architecture, where it is known.
        width: width of the activations.
        point: where in the model they are read.
        detector: ``"features"`` or ``"probe"``, which of the two decides.
        probe: the plain probe, always there.
        features: the autoencoder's features; None where there is no autoencoder or none of its features differ.
        sae: where the autoencoder comes from, as the registry or ``read_sae`` takes it.
        threshold: score above which a token shows the behavior.
        correction: what is done then.
        steering_vector_id: whose direction the correction has, where one was given.
        figures: AUROCs, rates and effects on held-out examples, as ``create_behavior`` tells them.
    """

    name: str
    description: str
    model: str
    family: str | None
    width: int
    point: HookPoint
    detector: Literal["features", "probe"]
    probe: ProbeDetector
    features: FeatureDetector | None
    sae: str | None
    threshold: float
    correction: Correction
    steering_vector_id: str | None = None
    figures: Mapping[str, Any] = field(default_factory=dict)

    @property
    def decides(self) -> Detector:
        """The detector that is asked."""
        if self.detector == "features":
            assert self.features is not None
            return self.features
        return self.probe

    def scores(self, x: Tensor) -> Tensor:
        """[T] scores of activations [T, d]: 0 as in negative examples, 1 as in positive ones, on average."""
        return self.decides.scores(x)

    def as_dict(self) -> dict[str, Any]:
        """What there is to say of it, for people and for JSON."""
        return {
            "behavior_name": self.name,
            "description": self.description,
            "model": self.model,
            "point": str(self.point),
            "detector": self.detector,
            "features": None if self.features is None else self.features.names,
            "sae": self.sae,
            "threshold": self.threshold,
            "correction": {"way": self.correction.way, "strength": self.correction.strength},
            "steering_vector_id": self.steering_vector_id,
            **self.figures,
        }
