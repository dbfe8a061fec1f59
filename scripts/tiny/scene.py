"""One text's cast, place and tone, and the filling of sentence templates from them."""

from __future__ import annotations

import copy
import random
import re

from . import world
from .lexicon import SLOTS

CITY_GAPS = ("city", "country", "river", "food", "landmark", "language")

_GAP = re.compile(r"\{(\w+)\}")
_ARTICLE = re.compile(r"\b([Aa]) (?!usual)(?=[aeiouAEIOU])")


class Scene:
    """The latent variables of one text: who, where, with what, and in which tone.

    Args:
        rng: source of every draw.
        tone: one of `lexicon.TONES`; the slots of a template are filled with its words.
        second: another tone that takes turns with the first.
        purity: chance that a slot is filled in the text's tone rather than in the neutral one.
    """

    def __init__(
        self, rng: random.Random, tone: str, second: str | None = None, *, purity: float = 0.8
    ) -> None:
        self.rng = rng
        self.tones = (tone, second or tone)
        self.purity = purity
        self.city = rng.choice(world.CITIES)
        domain = world.DOMAINS[rng.choice(sorted(world.DOMAINS))]
        self.usual = domain.usual
        self.things = rng.sample(domain.things, 2)
        self.female = rng.random() < 0.5
        name, name2 = (
            rng.choice(world.WOMEN if self.female else world.MEN),
            rng.choice(world.WOMEN + world.MEN),
        )
        while name2 == name:
            name2 = rng.choice(world.WOMEN + world.MEN)
        he, his, him = ("she", "her", "her") if self.female else ("he", "his", "him")
        hour, hour2 = rng.sample(world.HOURS, 2)
        self.fixed = {
            "name": name,
            "Name": name,
            "name2": name2,
            "he": he,
            "He": he.capitalize(),
            "his": his,
            "His": his.capitalize(),
            "him": him,
            "place": rng.choice(domain.places),
            "other": rng.choice(domain.others),
            "day": rng.choice(world.DAYS),
            "hour": hour,
            "hour2": hour2,
        }

    def variant(self, state: float, *, tone: str | None = None, city: world.City | None = None) -> Scene:
        """Returns the same scene in another tone or city, drawing from a state of its own, wholly in its tone."""
        twin = copy.copy(self)
        twin.rng, twin.purity = random.Random(state), 1.0
        twin.tones = (tone, tone) if tone else self.tones
        twin.city = city or self.city
        return twin

    def fill(self, template: str) -> str:
        """Returns the template with every gap filled from the scene, and "a" turned to "an" before vowels."""
        return _ARTICLE.sub(r"\1n ", _GAP.sub(lambda gap: self._value(gap[1]), template))

    def _value(self, gap: str) -> str:
        rng = self.rng
        if gap == "Name":
            return self.fixed["name"] if rng.random() < 0.7 else self.fixed["He"]
        if gap in self.fixed:
            return self.fixed[gap]
        if gap in CITY_GAPS:
            return str(getattr(self.city, "name" if gap == "city" else gap))
        if gap == "thing":
            return rng.choice(self.things)
        if gap == "sight":
            return rng.choice(self.city.sights)
        if gap == "color":
            return rng.choice(world.COLORS)
        if gap == "weather":
            return rng.choice(world.WEATHER)
        if gap == "sky":
            return rng.choice(world.SKIES)
        tone = rng.choice(self.tones) if rng.random() < self.purity else "neutral"
        return rng.choice(SLOTS[tone][gap])
