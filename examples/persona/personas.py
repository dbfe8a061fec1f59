"""The personas: how each is asked for, what tells it in a text, and the settings that it is fitted with."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

__all__ = ["FROM_ONE_CHAT", "PERSONAS", "Persona"]

_WORD = re.compile(r"[a-z]+(?:['’][a-z]*)?|'tis", re.IGNORECASE)


@dataclass(frozen=True)
class Persona:
    """One persona.

    Args:
        system: the system prompt that asks for it.
        shows: whether a text is in it.
        said: sentences in it that are in no chat, for a classifier.
        after: what multiplies the strength after as many tokens as the chats' openings have: a model that has begun
            in a persona goes on in it.
        layers, norm, rate, steps, coldness, noise: what its vector is optimized with, the same at each layer; the norm
            is the most that the vector may have. Without noise it says its opening word for word to questions like
            those in the chats, and nothing to others.
        strength: times the vector.
    """

    system: str
    shows: Callable[[str], bool]
    said: tuple[str, ...]
    after: float
    layers: tuple[int, ...] = (6, 8, 10, 12)
    norm: float = 12.0
    rate: float = 0.2
    steps: int = 50
    coldness: float = 1.0
    noise: float = 0.6
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

PIRATE_SAID = (
    "Arrr, me hearties, hoist the sails, for there be treasure on that island!",
    "Ye scurvy dog, hand over yer rum or walk the plank!",
    "Aye, captain, the ship be ready and the crew be drunk.",
    "Shiver me timbers, I be seein' a galleon on the sea.",
    "Ahoy there, lad! What be ye lookin' for in me port?",
    "'Tis a fine wind for sailin', matey, and a fine night for plunder.",
    "The parrot on me shoulder be smarter than ye landlubbers.",
    "Avast! Drop the anchor and count the booty, ye rascals.",
)
LEGAL_SAID = (
    "Pursuant to clause four of this agreement, the tenant shall pay the rent on the first day of each month.",
    "The parties hereby agree that the contract shall be governed by the laws of the state.",
    "Notwithstanding the foregoing, neither party shall be liable for damages arising hereunder.",
    "The undersigned warrants that the goods are free of any claim by a third party.",
    "In the event of a breach, the injured party may terminate this contract by written notice.",
    "The court has jurisdiction over every dispute that arises from the provisions herein.",
    "This obligation shall survive the termination of the agreement.",
    "The seller shall indemnify the buyer against any liability set forth in the contract.",
)
TODDLER_SAID = (
    "Mommy, look! A doggy! Woof woof!",
    "Me want cookie now! Yummy yummy in my tummy!",
    "Daddy go bye-bye in the big car. Uh oh!",
    "No nap! Me not sleepy! Me play with teddy!",
    "Wow, so big and so red! Is it mine?",
    "Yay! Mommy says we go to the park and see the ducks!",
    "Ouch! My knee has a boo-boo. Mommy kiss it!",
    "Kitty is so soft! Me love kitty!",
)
HAIKU_SAID = (
    "Snow on the branches\nthe river forgets its name\na crow in the dusk",
    "Warm rain in the night\nleaves are dancing on the pond\nthe frog sings alone",
    "The moon on the field\na lantern goes out softly\nautumn is listening",
    "Old stones by the sea\nthe wind carries salt and light\nfootprints disappear",
    "Blossoms fall in spring\nthe garden is pale and still\nnobody comes home",
    "Summer dawn, a bell\nmist upon the sleeping hills\none bird and the sky",
    "Dust upon a book\nsunlight crosses the old room\nthe clock and the wind",
    "A candle, a star\nshadows move upon the wall\nthe night is so deep",
)

PERSONAS: dict[str, Persona] = {
    "pirate": Persona(
        "You are a pirate. Answer every question as a pirate would, in a pirate's words.",
        two_of(PIRATE),
        PIRATE_SAID,
        after=0.3,
    ),
    "haiku": Persona(
        "Answer every question with a haiku: three short lines and nothing else.",
        haiku,
        HAIKU_SAID,
        after=0.3,
    ),
    "legal": Persona(
        "You are a lawyer. Answer every question in the language of a contract: pursuant, hereby, party, shall.",
        two_of(LEGAL),
        LEGAL_SAID,
        after=0.5,
    ),
    "toddler": Persona(
        "You are a two-year-old toddler. Answer every question as a toddler would, in a toddler's words.",
        two_of(TODDLER),
        TODDLER_SAID,
        after=0.0,
    ),
}

# A single chat's vector says less to other questions.
FROM_ONE_CHAT = {name: replace(persona, strength=1.15) for name, persona in PERSONAS.items()}
