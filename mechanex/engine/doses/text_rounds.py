"""The last few kinds of dose by the texts that they make, each at the strength whose texts cost what is allowed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from .dose import Dose
from .families import Family, worth
from .judge import TextJudge
from .swept import Setting

__all__ = ["later_texts", "text_rounds"]

# How log-perplexity grows with strength, where only one strength was seen: between 1 and 2 on SmolLM2 and mx-tiny.
POWER = 1.4
# Of the allowed perplexity's logarithm: where doses are aimed, so that most land within.
AIM = 0.95
NEAR = 0.06  # of the aim: a dose that near isn't tried again
LEAST = 0.02  # nats: a smaller rise of log-perplexity is chance
STEP = 2.0  # most that a strength is changed by at once
LAST = 2  # kinds of dose that are aimed a third time


def later_texts(finalists: int) -> int:
    """How many settings write texts after the first of each kind, at most."""
    return math.ceil(finalists / 2) + LAST


@dataclass
class _Tried:
    """A kind of dose and what texts it made."""

    family: Family
    found: list[Setting] = field(default_factory=list)

    def next_strength(self, aim: float) -> float:
        """Where the texts should cost ``aim``, the logarithm of perplexity over plain."""
        seen = sorted(((one.dose.strength, _cost(one)) for one in self.found), key=lambda both: abs(both[0]))
        strength, cost = min(seen, key=lambda both: abs(both[1] - aim))
        power = POWER
        if len(seen) > 1 and seen[-1][1] > seen[0][1]:
            power = math.log(seen[-1][1] / seen[0][1]) / math.log(seen[-1][0] / seen[0][0])
        factor: float = (aim / cost) ** (1 / max(power, 0.7))
        return strength * min(max(factor, 1 / STEP), STEP)

    def effect(self, aim: float) -> float:
        """Its effect at that price: in proportion to strength, from the dose whose texts cost nearest to it."""
        best = min(self.found, key=lambda one: abs(_cost(one) - aim))
        assert best.texts is not None
        return best.texts.effect * abs(self.next_strength(aim) / best.dose.strength)

    def near(self, aim: float) -> bool:
        """Whether its texts were made at about that price."""
        return any(abs(_cost(one) / aim - 1) < NEAR for one in self.found)


def text_rounds(judge: TextJudge, families: Sequence[Family], most: float, price: float) -> list[Setting]:
    """Settings with their texts: each kind of dose once, half of them again, the best few a third time.

    Args:
        judge: writes and judges texts.
        families: kinds of dose, the best first, with what they did to given answers.
        most: the perplexity that is allowed, as a multiple of plain.
        price: mean KL per token of given answers, nats, at which each begins.
    """
    aim = AIM * math.log(most)
    tried = [_Tried(family) for family in families]
    first = []
    for family in families:
        prices, gains = [one.kl for one in family.settings], [one.gain for one in family.settings]
        first.append(family.at(worth(family.strengths, prices, gains, price)[0]))
    _write(judge, tried, first)
    for n in (math.ceil(len(tried) / 2), LAST):
        tried.sort(key=lambda one: -one.effect(aim))
        again = [one for one in tried[:n] if not one.near(aim)]
        _write(judge, again, [one.family.at(one.next_strength(aim)) for one in again])
    return [one for each in tried for one in each.found]


def _write(judge: TextJudge, tried: Sequence[_Tried], doses: Sequence[Dose]) -> None:
    for one, dose, texts in zip(tried, doses, judge.texts(doses), strict=True):
        known = [setting for setting in one.family.settings if setting.dose == dose]
        setting = known[0] if known else Setting(dose, math.nan, math.nan, math.nan, 0)
        one.found.append(replace(setting, texts=texts))


def _cost(setting: Setting) -> float:
    assert setting.texts is not None
    return max(LEAST, math.log(setting.texts.perplexity))
