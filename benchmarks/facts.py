"""Questions over given facts, and which of the facts holds the answer, for the bundled model and for SmolLM2."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "scripts"))
from tiny.grammar import given

__all__ = ["Asked", "copied_facts", "given_sentences"]

PEOPLE = [
    "Mia",
    "Lucy",
    "Tom",
    "Peter",
    "Emma",
    "Julia",
    "Maria",
    "Clara",
    "Hugo",
    "Leo",
    "Nora",
    "Felix",
    "Sara",
]
SURNAMES = [
    "Keller",
    "Okafor",
    "Lindqvist",
    "Marino",
    "Tanaka",
    "Novak",
    "Duarte",
    "Haugen",
    "Petrov",
    "Castell",
]
PLACES = ["Lisbon", "Oslo", "Nairobi", "Quito", "Hanoi", "Krakow", "Perth", "Tunis", "Riga", "Lima"]
JOBS = [
    "baker",
    "pilot",
    "dentist",
    "carpenter",
    "violinist",
    "surveyor",
    "gardener",
    "chemist",
    "tailor",
    "welder",
]


@dataclass(frozen=True)
class Asked:
    """A question with its answer.

    Args:
        sentences: the facts.
        question: one about them.
        answer: the true one.
        where: which of the facts holds it; None for none.
    """

    sentences: tuple[str, ...]
    question: str
    answer: str
    where: int | None


def given_sentences(seed: int, absent: bool = False) -> Asked:
    """Who has what, in which colour: what the bundled model was trained to answer, drawn anew."""
    told, question, answer = given(random.Random(seed))
    sentences = [f"{one}." for one in told.removesuffix(".").split(". ")]
    held = set(answer.removesuffix(".").split()) - {"The", "the", "has", "is", "a", "an"}
    (where,) = (i for i, one in enumerate(sentences) if held <= set(one.removesuffix(".").split()))
    if absent:
        del sentences[where]
    return Asked(tuple(sentences), question, answer, None if absent else where)


def copied_facts(seed: int, absent: bool = False) -> Asked:
    """Facts that nobody could know and an answer has to copy: where people were born, what they do, their numbers."""
    rng = random.Random(seed)
    n = 4
    people = [f"{a} {b}" for a, b in zip(rng.sample(PEOPLE, n + 1), rng.sample(SURNAMES, n + 1), strict=True)]
    places, jobs = rng.sample(PLACES, n + 1), rng.sample(JOBS, n + 1)
    codes = rng.sample(range(1000, 9999), n + 1)
    kinds: list[Callable[[str, int], tuple[str, str]]] = [
        lambda who, i: (f"{who} was born in {places[i]}.", f"Where was {who} born?"),
        lambda who, i: (f"{who} works as a {jobs[i]}.", f"What is the job of {who}?"),
        lambda who, i: (
            f"The locker of {who} has the code {codes[i]}.",
            f"Which code has the locker of {who}?",
        ),
    ]
    told = [rng.choice(kinds)(who, i) for i, who in enumerate(people)]
    which = n if absent else rng.randrange(n)
    facts = tuple(fact for fact, _ in told[:n])
    # The answer says it as a sentence, as the fact does: what is asked for is its last word.
    return Asked(facts, told[which][1], told[which][0], None if absent else which)
