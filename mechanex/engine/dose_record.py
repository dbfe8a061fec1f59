"""What calibration saw of a vector: how far texts move at which strength, kept in the vector's metadata."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import asdict, dataclass, replace

from ..errors import ValidationError

__all__ = ["FIELD", "DoseRecord"]

_log = logging.getLogger(__name__)

FIELD = "calibration"
"""Its name in a vector's metadata."""


@dataclass(frozen=True)
class DoseRecord:
    """A calibrated dose, and what other strengths did on the same texts.

    Args:
        kl: nats that 95 % of tokens stay within at ``strength``: KL(steered‖plain) of the next token's distribution,
            from logits before temperature.
        strength: multiplies the vector.
        seen: (strength, that quantile there), by ascending strength.
        tokens: how many tokens it was measured on.
    """

    kl: float
    strength: float
    seen: tuple[tuple[float, float], ...]
    tokens: int

    def text(self) -> str:
        """The record as a text for metadata."""
        return json.dumps(asdict(self))

    @classmethod
    def of(cls, text: str) -> DoseRecord:
        """The record that :meth:`text` wrote.

        Raises:
            ValidationError: the text is no such record.
        """
        try:
            found = json.loads(text)
            seen = tuple((float(strength), float(kl)) for strength, kl in found["seen"])
            return cls(float(found["kl"]), float(found["strength"]), seen, int(found["tokens"]))
        except (ValueError, TypeError, KeyError) as error:
            raise ValidationError(
                f"the metadata field {FIELD!r} of a vector is no record of a calibration: {text[:60]!r}."
            ) from error

    def scaled(self, factor: float) -> DoseRecord:
        """The same record for the vector times ``factor``, which isn't 0."""
        seen = sorted((strength / factor, kl) for strength, kl in self.seen)
        return replace(self, strength=self.strength / factor, seen=tuple(seen))

    def warn(self, strength: float) -> None:
        """Logs what was seen at the nearest strength when this one is outside of what was calibrated."""
        strengths = [0.0, *(at for at, _ in self.seen)]
        if min(strengths) <= strength <= max(strengths) or not self.seen:
            return
        at, kl = min(self.seen, key=lambda one: math.fabs(one[0] - strength))
        _log.warning(
            "strength %.3g is outside of %.3g to %.3g, where the vector was calibrated: at %.3g, 95 %% of tokens moved "
            "by up to %.3g nats (its dose of %.3g nats is at strength %.3g)",
            strength,
            min(strengths),
            max(strengths),
            at,
            kl,
            self.kl,
            self.strength,
        )
