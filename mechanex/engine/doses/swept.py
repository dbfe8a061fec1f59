"""What a sweep found: every setting that was tried, the front of effect against price, and what it recommends."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...home import atomic_path
from ..figures import BLUE, RED, figure_to
from ..vectors import SteeringVector
from .dose import Dose
from .halving import front
from .intervals import Interval

__all__ = ["Setting", "Swept", "Texts", "finite"]


@dataclass(frozen=True)
class Texts:
    """What a dose did to the texts that the model wrote.

    Args:
        effect: mean score, less that of the plain model's texts.
        perplexity: of the texts under the plain model, as a multiple of that of its own texts.
        repetition: mean share of repeated runs of four tokens.
    """

    effect: float
    perplexity: float
    repetition: float


@dataclass(frozen=True)
class Setting:
    """One dose that was tried.

    Args:
        dose: which.
        gain: change of the mean log-odds, positive answer against negative, in nats per token.
        kl: mean KL per token against plain, nats.
        kl95: its 95th percentile.
        examples: on how many pairs of answers these three were measured; 0: they weren't, and are NaN.
        texts: what it did to texts on the validation prompts, where it came that far.
    """

    dose: Dose
    gain: float
    kl: float
    kl95: float
    examples: int
    texts: Texts | None = None

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Swept:
    """The result of a sweep.

    Args:
        model: its id.
        settings: all that were tried, those of the last rounds last.
        chosen: the one that is recommended.
        most: perplexity that was allowed, as a multiple of plain.
        confirmed: effect and perplexity of the chosen one on held-out prompts, each with its interval; None where there
            were no such prompts.
        plain_score, plain_perplexity: of the plain model's texts on the validation prompts.
        evaluations: what the sweep cost, in whole evaluations of one setting (texts for every validation prompt, and
            their perplexity), counted in tokens times layers.
        sentence: the recommendation.
        vectors: by method, what the doses are of.
    """

    model: str
    settings: list[Setting]
    chosen: Setting
    most: float
    confirmed: dict[str, Interval] | None
    plain_score: float
    plain_perplexity: float
    evaluations: float
    sentence: str
    vectors: dict[str, SteeringVector]

    @property
    def front(self) -> list[Setting]:
        """The settings with texts that none is better than at the same price or less, cheapest first."""
        found = [one for one in self.settings if one.texts is not None]
        texts = [one.texts for one in found if one.texts is not None]
        return [found[i] for i in front([t.effect for t in texts], [t.perplexity for t in texts])]

    def vector(self) -> SteeringVector:
        """The vector whose strength 1 is the chosen dose."""
        return self.chosen.dose.vector(self.vectors[self.chosen.dose.method])

    def as_dict(self) -> dict[str, Any]:
        """Everything but the vectors, for JSON."""
        return {
            "model": self.model,
            "recommendation": self.sentence,
            "chosen": self.chosen.as_dict(),
            "confirmed": {name: asdict(one) for name, one in (self.confirmed or {}).items()} or None,
            "most_perplexity": self.most,
            "plain": {"score": self.plain_score, "perplexity": self.plain_perplexity},
            "evaluations": self.evaluations,
            "front": [one.as_dict() for one in self.front],
            "settings": [one.as_dict() for one in self.settings],
        }

    def table(self) -> str:
        """The settings with texts as lines of a table, cheapest first; a star for those on the front."""
        best = {id(one) for one in self.front}
        lines = [f"  {'dose':44} {'effect':>7} {'perplexity':>10} {'repeats':>7} {'log-odds':>8} {'KL':>6}"]
        written = [(one, one.texts) for one in self.settings if one.texts is not None]
        for one, texts in sorted(written, key=lambda both: both[1].perplexity):
            mark = "*" if id(one) in best else " "
            lines.append(
                f"{mark} {one.dose!s:44} {texts.effect:+7.3f} {texts.perplexity:9.2f}× {texts.repetition:7.2f} "
                + (f"{one.gain:+8.3f} {one.kl:6.2f}" if one.examples else f"{'–':>8} {'–':>6}")
            )
        return "\n".join(lines)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes everything but the vectors as JSON."""
        with atomic_path(Path(path)) as temporary:
            Path(temporary).write_text(
                json.dumps(finite(self.as_dict()), indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
            )

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draws effect against perplexity, the front as a line, to a .png, .svg or .pdf file.

        Raises:
            ValidationError: another ending, or matplotlib isn't installed.
        """
        written = [one.texts for one in self.settings if one.texts is not None]
        best = [one.texts for one in self.front if one.texts is not None]
        with figure_to(path, 6, 4) as figure:
            axes = figure.add_subplot()
            axes.axhline(0, color="#bbbbbb", linewidth=0.8)
            axes.axvline(self.most, color="#bbbbbb", linewidth=0.8, linestyle="--")
            axes.scatter([t.perplexity for t in written], [t.effect for t in written], s=16, color=BLUE)
            axes.plot([t.perplexity for t in best], [t.effect for t in best], color=BLUE, linewidth=1)
            if self.chosen.texts is not None:
                axes.scatter([self.chosen.texts.perplexity], [self.chosen.texts.effect], s=60, color=RED)
            axes.set(xlabel="perplexity under the plain model, × plain", ylabel="effect", xscale="log")
            axes.set_title(str(self.chosen.dose), fontsize=10)
            axes.spines[["top", "right"]].set_visible(False)


def finite(found: Any) -> Any:
    """What JSON can hold: numbers that aren't finite become None."""
    if isinstance(found, float):
        return found if math.isfinite(found) else None
    if isinstance(found, dict):
        return {name: finite(value) for name, value in found.items()}
    return [finite(value) for value in found] if isinstance(found, (list, tuple)) else found
