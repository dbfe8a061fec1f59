"""Conditions on prompts: whether an answer is steered at all, decided once when its prompt has been read."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ..errors import ValidationError
from .given import as_finite, as_vector
from .whole import as_whole

__all__ = ["PromptCondition", "alignment"]


@dataclass(frozen=True, eq=False)
class PromptCondition:
    """Met by prompts whose residual stream points a certain way (CAST, arXiv:2409.05907).

    A prompt's score is the mean over its tokens after the first of x·w / ‖x‖, with x the residual stream that enters
    ``layer``; the condition is met above ``threshold``. The first token, which draws attention whatever follows, counts
    only where it is alone.

    Args:
        layer: 0 … n_layers.
        weight: w [d_model]; kept at norm 1.
        threshold: in [-1, 1] as cosines are.
        false_positives: share of held-out other prompts that met it, where it was calibrated.
        true_positives: share of held-out prompts of its own kind that met it.

    Raises:
        ValidationError: a weight that has no direction, a threshold or share that is no finite number, or a negative
            layer.
    """

    layer: int
    weight: Tensor
    threshold: float
    false_positives: float | None = None
    true_positives: float | None = None

    def __post_init__(self) -> None:
        layer = as_whole(self.layer)
        if layer is None or layer < 0:
            raise ValidationError(f"A condition's layer counts from 0; got {self.layer!r}.")
        weight = as_vector("a condition's weight", self.weight).detach()
        weight = weight.to(torch.float32 if weight.dtype != torch.float64 else torch.float64)
        norm = float(weight.norm())
        if not math.isfinite(norm) or norm == 0:
            raise ValidationError(f"A condition needs a direction, but its weight's norm is {norm}.")
        threshold = as_finite(self.threshold)
        if threshold is None:
            raise ValidationError(f"A condition's threshold is a finite number; got {self.threshold!r}.")
        for name in ("false_positives", "true_positives"):
            object.__setattr__(self, name, _share(name, getattr(self, name)))
        object.__setattr__(self, "layer", layer)
        object.__setattr__(self, "weight", weight / norm)
        object.__setattr__(self, "threshold", threshold)

    def said(self) -> dict[str, Any]:
        """All but the weight, as JSON has it: what is given beside ``weight=`` to make it again."""
        return {one.name: getattr(self, one.name) for one in fields(self) if one.name != "weight"}

    @property
    def width(self) -> int:
        """d_model."""
        return self.weight.shape[0]

    def met(self, score: float) -> bool:
        """Whether a prompt of this score meets it."""
        return score > self.threshold


def _share(name: str, value: object) -> float | None:
    number = None if value is None else as_finite(value)
    if value is not None and number is None:
        raise ValidationError(f"A condition's {name} are a share or None; got {value!r}.")
    return number


def alignment(hidden: Tensor, weight: Tensor) -> Tensor:
    """x·w / ‖x‖ of each token [..., d_model] in float32 at least; 0 for x = 0."""
    wide = hidden if hidden.dtype == torch.float64 else hidden.float()
    norms = torch.linalg.vector_norm(wide, dim=-1)
    found: Tensor = (wide @ weight.to(wide)) / norms.where(norms > 0, 1.0)
    return found
