"""What a persona is fitted to and with, tried on questions that ``persona.py`` doesn't ask.

    python examples/persona/choose.py --persona legal --opening "As a lawyer, I" --opening "Pursuant to the contract,"
    python examples/persona/choose.py --persona legal --layers 10 --layers 6,8,10,12 --norm 12 --norm 24

Prints each setting's share of answers in the persona, the repetition in them, and their perplexity beside that of the
system prompt's answers; and of those at most twice as improbable as these, the one whose share less its repetition is
largest.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from itertools import product

from persona import TEMPERATURE, asked_for, chats_of, fading, fitted, opening_of, perplexity
from personas import PERSONAS, Persona

from mechanex.engine.datasets import Prompt
from mechanex.engine.doses.dose import edited_by
from mechanex.engine.doses.questions import as_chats
from mechanex.engine.doses.written import write
from mechanex.engine.models import adapter_for
from mechanex.engine.models.resolve import LoadedModel, load
from mechanex.engine.optimize.datapoints import TrainingDatapoint
from mechanex.engine.sampling import Options

QUESTIONS = (
    "How do I fix a dripping tap?",
    "What is the capital of Spain?",
    "Why do cats purr?",
    "How many days are in a week?",
    "Tell me about the moon.",
    "What should I cook for dinner tonight?",
    "How do airplanes fly?",
    "Who painted the Mona Lisa?",
    "What is a good gift for my sister?",
    "How can I save money?",
    "Describe your favourite season.",
    "What is the fastest animal?",
    "How do I start running?",
    "Why is the grass green?",
    "What do bees do?",
    "Tell me a joke.",
    "How do I plant a tree?",
    "What is photosynthesis?",
    "What is the best way to learn a language?",
    "Explain how a clock works.",
    "What makes a good friend?",
    "How do I make pancakes?",
    "Why do we dream?",
    "What is the largest planet?",
)
STRENGTHS = (0.85, 1.0, 1.15)
AFTER = (0.0, 0.15, 0.3, 0.5)
MOST = 2.0
OPTIONS = Options(max_tokens=48, seed=0, temperature=TEMPERATURE)


@dataclass(frozen=True)
class Tried:
    """A setting, and what answers under it show and cost: shares, and a ratio of perplexities."""

    persona: Persona
    opening: str
    shows: float
    repetition: float
    ratio: float

    @property
    def worth(self) -> float:
        """What is wanted: the persona, without repeating oneself."""
        return self.shows - self.repetition

    def __str__(self) -> str:
        one = self.persona
        return (
            f"{self.opening!r}, layers {','.join(map(str, one.layers))}, norm {one.norm:g}, noise {one.noise:g}, "
            f"{one.strength:g} times, then {one.after:g}: "
            f"shows {self.shows:.2f}, repetition {self.repetition:.2f}, perplexity {self.ratio:.2f} times"
        )


def tried(
    loaded: LoadedModel, persona: Persona, chats: list[TrainingDatapoint], asked: list[Prompt], own: float
) -> list[Tried]:
    """A persona's vector at every strength, each with every way to go on after an answer's opening.

    Args:
        loaded: the model.
        persona: what the vector is fitted with.
        chats: what it is fitted to.
        asked: the questions after the system prompt that asks for the persona.
        own: perplexity of the answers that the plain model gives to these.
    """
    adapter = adapter_for(loaded.model)
    settings = [replace(persona, strength=strength, after=after) for strength in STRENGTHS for after in AFTER]
    vector, opening = fitted(loaded, persona, chats), opening_of(loaded, chats)
    plans = [
        edited_by(adapter, fading(vector, opening, one.after), strength=one.strength) for one in settings
    ]
    written = write(adapter, loaded.tokenizer, as_chats(QUESTIONS, loaded.tokenizer), plans, OPTIONS)
    return [
        Tried(
            setting,
            chats[0].dst_completions[0],
            sum(persona.shows(one.text) for one in texts) / len(texts),
            sum(one.repetition for one in texts) / len(texts),
            perplexity(loaded, asked, [one.text for one in texts]) / own,
        )
        for setting, texts in zip(settings, written, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--persona", choices=sorted(PERSONAS), default="pirate")
    parser.add_argument("--chats", type=int, default=4, choices=range(1, 5), help="how many it is made from")
    parser.add_argument(
        "--opening",
        action="append",
        help="of every chat's answer, in place of its own; a line break is a real one, $'…\\n…' in bash; repeated",
    )
    parser.add_argument(
        "--layers",
        action="append",
        type=lambda text: tuple(int(one) for one in text.split(",")),
        help="such as 8, or 6,8,10,12: the same vector at each; repeated; the persona's if not given",
    )
    parser.add_argument("--norm", action="append", type=float, help="repeated; the persona's if not given")
    parser.add_argument("--noise", action="append", type=float, help="repeated; the persona's if not given")
    args = parser.parse_args()
    loaded = load(args.model, backend="transformers", dtype="float32")
    persona = PERSONAS[args.persona]
    texts, asked = asked_for(loaded, persona, OPTIONS, QUESTIONS)
    own = perplexity(loaded, asked, [one.text for one in texts])
    chats = chats_of(args.persona, args.chats)
    found: list[Tried] = []
    for opening, layers, norm, noise in product(
        args.opening or [None],
        args.layers or [persona.layers],
        args.norm or [persona.norm],
        args.noise or [persona.noise],
    ):
        wanted = chats if opening is None else [replace(one, dst_completions=[opening]) for one in chats]
        setting = replace(persona, layers=layers, norm=norm, noise=noise)
        for one in tried(loaded, setting, wanted, asked, own):
            print(one, flush=True)
            found.append(one)
    fitting = [one for one in found if one.ratio <= MOST]
    print(f"\nthe best: {max(fitting, key=lambda one: one.worth)}" if fitting else "\nnone is cheap enough")


if __name__ == "__main__":
    main()
