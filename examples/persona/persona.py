"""A persona from four chats: one vector by gradient descent, and what the model says with it.

    python examples/persona/persona.py                      # a pirate on SmolLM2-135M-Instruct, no GPU
    python examples/persona/persona.py --persona toddler    # or haiku, legal
    python examples/persona/persona.py --chats 1            # from a single chat

The vector goes to out/persona/, and a page with all texts beside it.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from personas import FROM_ONE_CHAT, PERSONAS, Persona

from mechanex.engine.datasets import Prompt
from mechanex.engine.doses.ability import read_questions
from mechanex.engine.doses.questions import OPEN_QUESTIONS, as_chats
from mechanex.engine.doses.scorers import classifier
from mechanex.engine.doses.written import Written, mean_logprobs, write
from mechanex.engine.models import adapter_for
from mechanex.engine.models.resolve import LoadedModel, load
from mechanex.engine.optimize.datapoints import TrainingDatapoint, read_datapoints
from mechanex.engine.sampling import Options
from mechanex.engine.text import encode_pair
from mechanex.engine.vectors import SteeringVector
from mechanex.utils.doses import measure
from mechanex.utils.steering_opt import optimize_vector

HERE = Path(__file__).resolve().parent
TEMPERATURE = 0.5
MORE_QUESTIONS = (
    "How many legs has a spider?",
    "What is a good name for a dog?",
    "How do I boil an egg?",
    "Who wrote Romeo and Juliet?",
    "What is the largest ocean?",
    "How can I learn to draw?",
    "What is a haiku?",
)
QUESTIONS = [one for one in (*MORE_QUESTIONS, *OPEN_QUESTIONS) if "cup of tea" not in one]
ABILITY = HERE.parents[1] / "benchmarks" / "behaviors" / "ability.jsonl"


def chats_of(name: str, count: int) -> list[TrainingDatapoint]:
    """The first of a persona's chats."""
    return read_datapoints(HERE / f"{name}.jsonl")[:count]


def fitted(loaded: LoadedModel, persona: Persona, chats: list[TrainingDatapoint]) -> SteeringVector:
    """The vector of a persona from chats, with its whole strength at every token."""
    adapter = adapter_for(loaded.model)
    begun = time.perf_counter()
    vector, info = optimize_vector(
        loaded.model,
        chats,
        persona.layers,
        tokenizer=loaded.tokenizer,
        max_iters=persona.steps,
        max_norm=persona.norm,
        lr=persona.rate,
        lr_schedule="linear",
        coldness=persona.coldness,
        noise_scale=persona.noise,
        do_tangent_space_noise=False,
        seed=0,
        return_info=True,
    )
    print(f"{info['iters']} steps in {time.perf_counter() - begun:.0f} s, norm {float(vector.norm()):.3g}")
    return SteeringVector(
        {layer: torch.as_tensor(vector) for layer in persona.layers},
        model=adapter.model_id,
        model_family=adapter.family,
        method="optimized",
        seed=0,
    )


def opening_of(loaded: LoadedModel, chats: list[TrainingDatapoint]) -> int:
    """How many tokens the chats' openings have at most."""
    return max(len(encode_pair(loaded.tokenizer, one.prompt, one.dst_completions[0])[1]) for one in chats)


def fading(vector: SteeringVector, opening: int, after: float) -> SteeringVector:
    """A vector that has its whole strength for an opening's tokens.

    Args:
        vector: with its whole strength at every token.
        opening: how many tokens it has.
        after: what multiplies the strength from there on.
    """
    return vector.scheduled([1.0] * opening + [after])


def asked_for(
    loaded: LoadedModel, persona: Persona, options: Options, questions: Sequence[str]
) -> tuple[list[Written], list[Prompt]]:
    """What the plain model writes where a system prompt asks for the persona, and those prompts."""
    prompts: list[Prompt] = [
        [{"role": "system", "content": persona.system}, {"role": "user", "content": question}]
        for question in questions
    ]
    (texts,) = write(adapter_for(loaded.model), loaded.tokenizer, prompts, [()], options)
    return texts, prompts


def perplexity(loaded: LoadedModel, prompts: list[Prompt], texts: list[str]) -> float:
    """Of texts as answers to prompts, under the plain model."""
    pairs = [encode_pair(loaded.tokenizer, p, t) for p, t in zip(prompts, texts, strict=True) if t.strip()]
    written = [Written(tuple(prompt), tuple(answer), "") for prompt, answer in pairs]
    sums, counts = mean_logprobs(adapter_for(loaded.model), written)
    return math.exp(-float(sums.sum() / counts.sum()))


def after_opening(loaded: LoadedModel, text: str, opening: int) -> str:
    """A text without as many tokens as the chats' openings have, which the vector may have learned by heart."""
    ids = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
    return str(loaded.tokenizer.decode(ids[opening:]))


def judged(
    loaded: LoadedModel,
    persona: Persona,
    vector: SteeringVector,
    opening: int,
    args: argparse.Namespace,
    out: Path,
) -> dict[str, Any]:
    """Texts of questions that were in no chat, with what they show and cost."""
    options = Options(max_tokens=args.max_tokens, seed=0, temperature=TEMPERATURE)
    prompted, system_prompts = asked_for(loaded, persona, options, QUESTIONS[: args.questions])
    report = measure(
        loaded.model,
        vector,
        as_chats(QUESTIONS[: args.questions], loaded.tokenizer),
        {"persona": lambda text: float(persona.shows(text))},
        strength=persona.strength if args.strength is None else args.strength,
        questions=read_questions(ABILITY)[:: args.ability] if args.ability else None,
        brittleness=False,
        tokenizer=loaded.tokenizer,
        max_tokens=args.max_tokens,
        temperature=TEMPERATURE,
    )
    print(report.table())
    for question, one in zip(QUESTIONS, report.texts, strict=False):
        print(
            f"\n{question}\n  plain:   {' '.join(one.plain.split())}\n  steered: {' '.join(one.steered.split())}"
        )
    report.html(out)
    said = [*persona.said, *(one.text for one in prompted)]
    alike = classifier(said, [one.plain for one in report.texts])
    steered = [one.steered for one in report.texts]
    own = perplexity(loaded, system_prompts, [one.text for one in prompted])
    return {
        "shows": report.effects["persona"].steered.value,
        "shows after the opening": sum(
            persona.shows(after_opening(loaded, text, opening)) for text in steered
        )
        / len(steered),
        "plain shows": report.effects["persona"].plain.value,
        "prompted shows": sum(persona.shows(one.text) for one in prompted) / len(prompted),
        "classifier": sum(alike(text) > 0.5 for text in steered) / len(steered),
        "perplexity under the system prompt": perplexity(loaded, system_prompts, steered),
        "prompted perplexity": own,
        "repetition": report.repetition.steered.value,
        "plain repetition": report.repetition.plain.value,
        "ability": None
        if report.ability is None
        else [report.ability.plain.value, report.ability.steered.value],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--persona", choices=sorted(PERSONAS), default="pirate")
    parser.add_argument("--chats", type=int, default=4, choices=range(1, 5), help="how many it is made from")
    parser.add_argument("--again", action="store_true", help="take the vector that is in --out, and fit none")
    parser.add_argument("--strength", type=float, help="times the vector; that of the persona")
    parser.add_argument("--questions", type=int, default=8, help="up to 30, none of them in the four chats")
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument(
        "--ability",
        type=int,
        default=0,
        help="ask every so manieth of 200 multiple-choice questions; 0: none",
    )
    parser.add_argument("--out", type=Path, default=Path("out/persona"))
    args = parser.parse_args()
    persona = (FROM_ONE_CHAT if args.chats == 1 else PERSONAS)[args.persona]
    loaded = load(args.model, backend="transformers", dtype="float32")
    args.out.mkdir(parents=True, exist_ok=True)
    made = args.out / f"{args.persona}.safetensors"
    chats = chats_of(args.persona, args.chats)
    opening = opening_of(loaded, chats)
    if args.again:
        vector = SteeringVector.load(made)
    else:
        vector = fading(fitted(loaded, persona, chats), opening, persona.after)
        vector.save(made)
    figures = judged(loaded, persona, vector, opening, args, args.out / f"{args.persona}.html")
    (args.out / f"{args.persona}.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print()
    for name, figure in figures.items():
        print(f"{name:36} {figure}")


if __name__ == "__main__":
    main()
