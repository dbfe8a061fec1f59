"""A pirate from four chats: one vector by gradient descent, and what the model says with it.

    python examples/persona/persona.py                  # SmolLM2-135M-Instruct, half a minute on two quiet cores
    python examples/persona/persona.py --questions 30   # on more questions that it never saw

The vector goes to out/persona/pirate.safetensors, and a page with all texts beside it.
"""

from __future__ import annotations

import argparse
import re
import time
from pathlib import Path

import torch

from mechanex.engine.doses.questions import OPEN_QUESTIONS, as_chats
from mechanex.engine.models import adapter_for
from mechanex.engine.models.resolve import load
from mechanex.engine.optimize.datapoints import read_datapoints
from mechanex.engine.vectors import SteeringVector
from mechanex.utils.doses import measure
from mechanex.utils.steering_opt import optimize_vector

HERE = Path(__file__).resolve().parent
LAYER, NORM, RATE, STEPS = 12, 30, 0.1, 60
TEMPERATURE = 0.5
PIRATE = re.compile(
    r"\b(a+rr+|matey|ye|yer|yers?el\w*|aye|ahoy|avast|lad(die)?|hearties?|sea|ship|sail\w*|captain|treasure|booty|plunder"
    r"|scurvy|landlubber\w*|rum|me hearties|\w+in'|pirates?|cap'n)(?!\w)",
    re.IGNORECASE,
)
MORE_QUESTIONS = (
    "How many legs has a spider?",
    "What is a good name for a dog?",
    "How do I boil an egg?",
    "Who wrote Romeo and Juliet?",
    "What is the largest ocean?",
    "How can I learn to draw?",
)


def pirate(text: str) -> float:
    """Whether a text has two words or more of a pirate's."""
    return float(len(PIRATE.findall(text)) >= 2)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--layer", type=int, default=LAYER)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--strength", type=float, default=1.0)
    parser.add_argument("--questions", type=int, default=8, help="up to 30, none of them in the four chats")
    parser.add_argument("--max-tokens", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path("out/persona"))
    args = parser.parse_args()
    loaded = load(args.model, backend="transformers", dtype="float32")
    adapter = adapter_for(loaded.model)
    chats = read_datapoints(HERE / "chats.jsonl")
    begun = time.perf_counter()
    vector, info = optimize_vector(
        loaded.model,
        chats,
        args.layer,
        tokenizer=loaded.tokenizer,
        max_iters=args.steps,
        max_norm=NORM,
        lr=RATE,
        seed=0,
        return_info=True,
    )
    print(f"{info['iters']} steps in {time.perf_counter() - begun:.0f} s, norm {float(vector.norm()):.3g}")
    args.out.mkdir(parents=True, exist_ok=True)
    made = SteeringVector(
        {args.layer: torch.as_tensor(vector)},
        model=adapter.model_id,
        model_family=adapter.family,
        method="optimized",
        seed=0,
    )
    made.save(args.out / "pirate.safetensors")
    held_out = [one for one in (*MORE_QUESTIONS, *OPEN_QUESTIONS) if "cup of tea" not in one]
    report = measure(
        loaded.model,
        made,
        as_chats(held_out[: args.questions], loaded.tokenizer),
        {"pirate": pirate},
        strength=args.strength,
        brittleness=False,
        tokenizer=loaded.tokenizer,
        max_tokens=args.max_tokens,
        temperature=TEMPERATURE,
    )
    print(report.table())
    for question, one in zip(held_out, report.texts, strict=False):
        print(
            f"\n{question}\n  plain:   {' '.join(one.plain.split())}\n  steered: {' '.join(one.steered.split())}"
        )
    report.html(args.out / "report.html")


if __name__ == "__main__":
    main()
