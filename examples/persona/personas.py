"""The personas: how each is asked for, what tells it in a text, and the settings that it is fitted with."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["PERSONAS", "Persona"]

_WORD = re.compile(r"[a-z]+(?:['’][a-z]*)?|'tis", re.IGNORECASE)


@dataclass(frozen=True)
class Persona:
    """One persona.

    Args:
        system: the system prompt that asks for it.
        shows: whether a text is in it.
        layer, norm, rate, steps: what its vector is optimized with; the norm is the most that the vector may have.
        strength: times the vector.
    """

    system: str
    shows: Callable[[str], bool]
    layer: int = 12
    norm: float = 30.0
    rate: float = 0.1
    steps: int = 40
    strength: float = 1.0


def two_of(words: str) -> Callable[[str], bool]:
    """A judge: two words or more of a list; one that ends with ``*`` is the beginning of a word."""
    listed = words.split()
    whole = {word for word in listed if not word.endswith("*")}
    begins = tuple(word[:-1] for word in listed if word.endswith("*"))

    def shows(text: str) -> bool:
        found = [word.lower().replace("’", "'") for word in _WORD.findall(text)]
        return sum(word in whole or (bool(begins) and word.startswith(begins)) for word in found) >= 2

    return shows


def haiku(text: str) -> bool:
    """Whether a text begins with three lines of two to eight words each."""
    lines = [line for line in text.strip().splitlines() if line.strip()][:3]
    return len(lines) == 3 and all(2 <= len(line.split()) <= 8 for line in lines)


PIRATE = (
    "ar arr* aarr* matey* ye yer yerself yers aye ahoy avast lad lads lass laddie hearty hearties sea seas ship ships "
    "sail* captain* cap'n treasure* booty plunder* scurvy landlubber* rum me' o' th' 'tis pirate* askin' plank port "
    "anchor parrot crew scallywag* swashbuckl* blimey bein' lookin' makin' sayin' goin' tellin' buccaneer*"
)
LEGAL = (
    "pursuant hereby herein hereof hereto hereunder hereinafter thereof therein thereto whereas notwithstanding party "
    "parties shall deemed stipulat* liab* indemnif* clause* provision* agreement* contract* undersigned jurisdiction "
    "obligation* warrant* law laws legal* court* rights aforementioned foregoing forth statut* applicable"
)
TODDLER = (
    "me mommy daddy mama dada yummy tummy yay wow uh oh pwease wanna doggy kitty woof choo ouch hehe teehee bye "
    "yucky mine potty snack cookie* bunny ducky teddy hooray"
)

PERSONAS: dict[str, Persona] = {
    "pirate": Persona(
        "You are a pirate. Answer every question as a pirate would, in a pirate's words.", two_of(PIRATE)
    ),
    "haiku": Persona("Answer every question with a haiku: three short lines and nothing else.", haiku),
    "legal": Persona(
        "You are a lawyer. Answer every question in the language of a contract: pursuant, hereby, party, shall.",
        two_of(LEGAL),
    ),
    "toddler": Persona(
        "You are a two-year-old toddler. Answer every question as a toddler would, in a toddler's words.",
        two_of(TODDLER),
    ),
}
