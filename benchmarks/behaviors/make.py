"""Writes the contrastive pairs and the prompts of each behavior, and the questions of ability.

python benchmarks/behaviors/make.py

The tables beside it are written by hand; frames give each answer its manner. No frame is in two behaviors, and the
things that validation and test prompts ask about are in no pair.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
Pair = tuple[str, str, str]


def lines(name: str) -> list[list[str]]:
    """Rows of a hand-written table."""
    return [line.split("|") for line in (HERE / name).read_text(encoding="utf-8").splitlines() if line]


TOPICS = lines("topics.txt")
FRENCH = lines("french.txt")
THINGS = [row[0] for row in lines("things.txt")]

FRAMES = json.loads((HERE / "frames.json").read_text(encoding="utf-8"))
PARTS: dict[str, list[str]] = FRAMES["answers"]
QUESTIONS: dict[str, list[str]] = FRAMES["questions"]
TENSES = FRAMES["tenses"]
NAMES = tuple(QUESTIONS)
Answer = Callable[[random.Random, list[str]], str]


def framed(begin: str, end: str, middle: Callable[[list[str]], str]) -> Answer:
    """Answers made of a beginning, what ``middle`` takes of the topic, and an end; "" for none."""

    def answer(rng: random.Random, topic: list[str]) -> str:
        parts = [
            rng.choice(PARTS[begin]) if begin else "",
            middle(topic),
            rng.choice(PARTS[end]) if end else "",
        ]
        thing = topic[1]
        found = " ".join(part for part in parts if part)
        return found.replace("{thing}", thing).replace("{Thing}", thing[0].upper() + thing[1:])

    return answer


def fact(topic: list[str]) -> str:
    return topic[2]


def both(topic: list[str]) -> str:
    return f"{topic[2]} {topic[3]}"


def none(topic: list[str]) -> str:
    return ""


MANNERS: dict[str, tuple[Answer, Answer]] = {
    "cheerful_gloomy": (framed("glad", "glad_end", none), framed("sad", "sad_end", none)),
    "formal_casual": (framed("formal", "formal_end", fact), framed("casual", "casual_end", fact)),
    "brief_wordy": (framed("", "", fact), framed("wordy", "wordy_end", both)),
    "flattery": (framed("flatter", "flatter_end", fact), framed("", "", both)),
    "refusal": (framed("refuse", "refuse_end", none), framed("comply", "", both)),
    "certainty_hedging": (framed("sure", "sure_end", fact), framed("unsure", "unsure_end", fact)),
}


def pairs(name: str) -> list[Pair]:
    """The 60 pairs of a behavior: question, answer that shows it, answer that shows its opposite."""
    rng = random.Random(f"pairs of {name}")
    if name == "french_english":
        return [(topic[0], *answers) for topic, answers in zip(TOPICS, FRENCH, strict=True)]
    if name == "present_past":
        return [_tenses(rng, i) for i in range(60)]
    shows, opposite = MANNERS[name]
    return [(topic[0], shows(rng, topic), opposite(rng, topic)) for topic in TOPICS]


def _tenses(rng: random.Random, i: int) -> Pair:
    whos, did, was = TENSES["who"], TENSES["did"], TENSES["was"]
    who, deeds, state = whos[i % len(whos)], rng.sample(did, 2), rng.choice(was)
    name = who[0].lower() + who[1:] if " " in who else who
    question = rng.choice(("Tell me about {}.", "What about {}?", "Write about {}.")).format(name)
    made = [
        f"{who} {deeds[0][tense]} and {deeds[1][tense]}. {state[tense]}."
        if i % 3
        else f"{state[tense]}. {who} {deeds[0][tense]}, and then {deeds[1][tense]}."
        for tense in (0, 1)
    ]
    return question, made[0], made[1]


def prompts(name: str) -> tuple[list[str], list[str]]:
    """The 30 validation and 30 test questions of a behavior, about different things."""
    rng = random.Random(f"prompts of {name}")
    things = rng.sample(THINGS, 60)
    frames = QUESTIONS[name]
    asked = [frames[i % len(frames)].replace("{thing}", thing) for i, thing in enumerate(things)]
    return asked[:30], asked[30:]


def ability() -> list[dict[str, Any]]:
    """200 questions with four choices, the right one at a random place."""
    tables = json.loads((HERE / "ability_tables.json").read_text(encoding="utf-8"))
    rng = random.Random("ability")
    made = []
    for one in tables:
        question, table = one["question"], one["right"]
        rights = sorted(set(table.values()))
        for word, right in table.items():
            wrong = rng.sample([other for other in rights if other != right], 3)
            choices = [right, *wrong]
            rng.shuffle(choices)
            made.append(
                {"question": question.format(word), "choices": choices, "answer": choices.index(right)}
            )
    for _ in range(200):
        a, b = rng.randint(1, 9), rng.randint(1, 9)
        right = a + b
        choices = [str(right), *map(str, rng.sample([n for n in range(2, 19) if n != right], 3))]
        rng.shuffle(choices)
        question = {
            "question": f"How much is {a} plus {b}?",
            "choices": choices,
            "answer": choices.index(str(right)),
        }
        if len(made) < 200 and question["question"] not in {one["question"] for one in made}:
            made.append(question)
    return made[:200]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def chat(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def main() -> None:
    for name in NAMES:
        folder = HERE / name
        rows = [{"prompt": chat(q), "positive": a, "negative": b} for q, a, b in pairs(name)]
        write(folder / "pairs.jsonl", rows)
        for split, asked in zip(("validation", "test"), prompts(name), strict=True):
            write(folder / f"{split}.jsonl", [{"prompt": chat(question)} for question in asked])
    write(HERE / "ability.jsonl", ability())


if __name__ == "__main__":
    main()
