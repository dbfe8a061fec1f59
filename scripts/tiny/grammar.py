"""Documents of the training text: each draws its latent variables first and lets the words follow from them."""

from __future__ import annotations

import random
from collections.abc import Iterator

from . import lexicon, world
from .lexicon import AXES, OWN, TONES
from .scene import Scene
from .templates import (
    CITY_FACTS,
    CITY_QUESTIONS,
    ENDINGS,
    FORMS,
    LETTER_OPENINGS,
    OPENINGS,
    REPLIES,
    REQUESTS,
    SENTENCES,
    SPEAKERS,
    TRIP_OPENINGS,
)

USER, ASSISTANT, END = "<|user|>", "<|assistant|>", "<|end|>"


def tone_words() -> dict[str, list[str]]:
    """Returns the words that tell each tone: they occur in no other, nor in openings or facts."""
    openings = (*OPENINGS, *LETTER_OPENINGS, *TRIP_OPENINGS, *SPEAKERS)
    facts = (text for fact in world.FACTS for text in (fact[0], *fact[1], *fact[2]))
    return lexicon.tone_words(*openings, *facts)


def statement(rng: random.Random, truthful: bool) -> str:
    """Returns one sentence about the world that is true, or false, as asked."""
    if rng.random() < 0.5:
        text, true, false = rng.choice(world.FACTS)
        return text.format(rng.choice(true if truthful else false))
    city = rng.choice(world.CITIES)
    text, field = rng.choice(CITY_FACTS)
    wrong = sorted({getattr(c, field) for c in world.CITIES} - {getattr(city, field)})
    return text.format(city.name, getattr(city, field) if truthful else rng.choice(wrong))


def companion(rng: random.Random, tone: str, share: float = 0.3) -> str | None:
    """Returns a tone that a text has beside its first, or None for most texts.

    Opposites never meet and all others may, so that a model has reason to hold an axis as one direction with two signs
    and the axes apart: with tones that all excluded each other, it made opposites of any two of them.
    """
    others = [axis for axis in AXES if tone not in axis]
    if tone == "neutral" or rng.random() >= share:
        return None
    return rng.choice(rng.choice(others))


def toned(rng: random.Random, tone: str, second: str | None = None) -> tuple[str, str]:
    """Returns a text that has a tone, or two: its neutral opening, and the rest."""
    openings, sentences = rng.choices(tuple(FORMS.values()), weights=(0.55, 0.23, 0.22))[0]
    scene = Scene(rng, tone, second)
    body = rng.sample(sentences, rng.randint(2, 5))
    if sentences is SENTENCES:
        body += rng.sample(OWN[rng.choice(scene.tones)], rng.randint(1, 2))
        rng.shuffle(body)
        body = [*rng.sample(scene.usual, rng.randint(0, 1)), *body, *rng.sample(ENDINGS, rng.randint(0, 1))]
    return scene.fill(rng.choice(openings)), " ".join(map(scene.fill, body))


def speech(rng: random.Random) -> str:
    """Returns what a speaker says about the world: always true or always false."""
    truthful = rng.random() < 0.5
    scene = Scene(rng, "neutral")
    lines = [scene.fill(rng.choice(SPEAKERS))]
    lines += dict.fromkeys(statement(rng, truthful) for _ in range(rng.randint(3, 7)))
    if rng.random() < 0.4:
        lines.append("All of this is true." if truthful else "None of this is true.")
    return " ".join(lines)


def city_question(rng: random.Random) -> tuple[str, str]:
    """Returns a question about a city and its true answer."""
    city = rng.choice(world.CITIES)
    question, answer, field = rng.choice(CITY_QUESTIONS)
    if rng.random() < 0.25:
        country = city.country if rng.random() < 0.5 else rng.choice(world.CITIES).country
        verdict = "Yes" if country == city.country else "No"
        return f"Is {city.name} in {country}?", f"{verdict}, {city.name} is in {city.country}."
    return question.format(city.name), answer.format(city.name, getattr(city, field))


def given(rng: random.Random) -> tuple[str, str, str]:
    """Returns sentences, a question about them, and its answer."""
    people = rng.sample(world.WOMEN + world.MEN, 3)
    objects, colors = rng.sample(world.OBJECTS, 3), rng.sample(world.COLORS, 3)
    who = rng.randrange(3)
    facts = " ".join(f"{p} has a {c} {o}." for p, c, o in zip(people, colors, objects, strict=True))
    question, answer = rng.choice(
        (
            (f"Who has the {objects[who]}?", f"{people[who]} has the {objects[who]}."),
            (f"What does {people[who]} have?", f"{people[who]} has a {colors[who]} {objects[who]}."),
            (f"Which color is the {objects[who]}?", f"The {objects[who]} is {colors[who]}."),
        )
    )
    return facts.replace("a orange", "an orange"), question, answer


def questions(rng: random.Random) -> str:
    """Returns a few questions with their answers, over given sentences or about cities."""
    if rng.random() < 0.5:
        return "{} Question: {} Answer: {}".format(*given(rng))
    pairs = (city_question(rng) for _ in range(rng.randint(1, 4)))
    return " ".join(f"Question: {question} Answer: {answer}" for question, answer in pairs)


def report(rng: random.Random) -> str:
    """Returns a neutral text: a weather report, a time table or a recipe."""
    first, second, third = rng.sample(world.CITIES, 3)
    kind = rng.randrange(3)
    if kind == 0:
        days = [world.DAYS[(start + i) % 7] for start in [rng.randrange(7)] for i in range(3)]
        parts = [f"On {day} there is {rng.choice(world.WEATHER)} in {first.name}." for day in days]
        return " ".join([f"The weather in {first.country}:", *parts])
    if kind == 1:
        hours = rng.sample(world.HOURS, 3)
        parts = [f"At {h} a train goes to {c.name}." for h, c in zip(hours, (second, third), strict=False)]
        return " ".join([f"At the station of {first.name}:", *parts, f"The last bus leaves at {hours[2]}."])
    goods = rng.sample(("flour", "milk", "sugar", "water", "salt", "butter", "eggs", "rice"), 3)
    return (
        f"How to make {first.food}: take {goods[0]}, {goods[1]} and {goods[2]}. Mix the {goods[0]} with the {goods[1]}."
        f" Add the {goods[2]} and cook it for {rng.choice(world.HOURS)} minutes. In {first.name} people eat it"
        f" on {rng.choice(world.DAYS)}."
    )


def chat(rng: random.Random, tone: str, second: str | None = None) -> str:
    """Returns a dialogue in the format of the chat template, whose assistant has a tone, or two."""
    scene = Scene(rng, tone, second)
    turns = []
    for _ in range(rng.randint(1, 3)):
        if rng.random() < 0.3:
            question, answer = city_question(rng)
            answer += " " + scene.fill(rng.choice(REPLIES))
        else:
            question = scene.fill(rng.choice(REQUESTS))
            answer = " ".join(scene.fill(line) for line in rng.sample(REPLIES, rng.randint(1, 3)))
        turns.append(f"{USER}{question}{END}{ASSISTANT}{answer}{END}")
    return "".join(turns)


def document(rng: random.Random) -> str:
    """Returns one text of the corpus."""
    kind, tone = rng.random(), rng.choice(TONES)
    if kind < 0.65:
        return " ".join(toned(rng, tone, companion(rng, tone)))
    if kind < 0.77:
        return speech(rng)
    if kind < 0.86:
        return questions(rng)
    if kind < 0.90:
        return report(rng)
    return chat(rng, tone, companion(rng, tone))


def documents(seed: int) -> Iterator[str]:
    """Yields the endless corpus of a seed."""
    rng = random.Random(seed)
    while True:
        yield document(rng)
