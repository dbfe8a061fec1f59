"""Whether a dose that was calibrated on some prompts is the same dose on others, and what finding it costs.

    python benchmarks/doses.py                        # mx-tiny: calibrated layers on unseen prompts, and bisection
    python benchmarks/doses.py --model smollm2-135m --layers 10 15 20 25 --prompts 24

For each layer a mean difference is calibrated on one half of the prompts, and its KL per token read on the other half.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from mechanex import bundled
from mechanex.engine.caa import caa_vectors
from mechanex.engine.datasets import ContrastivePairs, prompt_of, read_lines, read_pairs
from mechanex.engine.doses.calibrate import dose_quantile, plain_pairs, search
from mechanex.engine.doses.forced import ForcedAnswers
from mechanex.engine.models import adapter_for
from mechanex.engine.models.adapter import ModelAdapter
from mechanex.engine.models.resolve import load
from mechanex.engine.text import Prompt
from mechanex.engine.vectors import SteeringVector

BEHAVIORS = Path(__file__).resolve().parent / "behaviors"
SPLITS = ("validation", "test")
WITHIN = 0.05


def material(model: str, n: int) -> tuple[dict[str, ContrastivePairs], list[Prompt]]:
    """Contrastive pairs by name, and twice n prompts that are in none of them."""
    if model == "mx-tiny":
        names = ("calm_angry", "hopeful_gloomy")
        pairs = {name: read_pairs(bundled.data_path(name), split="train") for name in names}
        read = [read_pairs(bundled.data_path(name), split="heldout").prompts for name in names]
    else:
        names = ("cheerful_gloomy", "formal_casual")
        pairs = {name: read_pairs(BEHAVIORS / name / "pairs.jsonl") for name in names}
        read = [
            [
                one
                for split in SPLITS
                for one in read_lines(BEHAVIORS / name / f"{split}.jsonl", prompt_of, None)
            ]
            for name in names
        ]
    # In turn, so that each half of the list has prompts of both.
    return pairs, [prompt for part in zip(*read, strict=False) for prompt in part][: 2 * n]


def bisected(
    forced: ForcedAnswers, adapter: ModelAdapter, vector: SteeringVector, budget: float, top: float
) -> int:
    """How many strengths bisection tries, ``top`` first, until one is within 5 % of the budget; one a pass."""
    low, high = 0.0, top
    forced.under([tuple(vector.plan(adapter, top).interventions)])
    for tried in range(2, 42):
        middle = (low + high) / 2
        (found,) = forced.under([tuple(vector.plan(adapter, middle).interventions)])
        moved = dose_quantile(found.kl)
        if abs(moved / budget - 1) <= WITHIN:
            return tried
        low, high = (middle, high) if moved < budget else (low, middle)
    raise RuntimeError(f"bisection between 0 and {top} finds no strength of {budget} nats")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="mx-tiny")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 3, 4, 5])
    parser.add_argument("--prompts", type=int, default=48, help="of each half")
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--kl", type=float, default=1.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--bisection", action=argparse.BooleanOptionalAction, default=True, help="time bisection beside it"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    loaded = load(args.model, backend="transformers", dtype=args.dtype)
    adapter = adapter_for(loaded.model)
    behaviors, prompts = material(args.model, args.prompts)
    halves = [
        plain_pairs(adapter, loaded.tokenizer, part, None, args.max_tokens, seed)
        for seed, part in enumerate((prompts[: args.prompts], prompts[args.prompts :]))
    ]
    known, unseen = (ForcedAnswers(adapter, half) for half in halves)
    print(
        f"{args.model}: calibrated to {args.kl:g} nats on {len(known)} tokens, read on {len(unseen)} others"
    )
    print(
        f"{'behavior':18} {'layer':>5} {'strength':>8} {'unseen KL':>9} {'tried':>6} {'s':>6} "
        f"{'bisection':>9} {'s':>6}"
    )
    moved = []
    for name, pairs in behaviors.items():
        part = (
            pairs.prompts[: args.pairs],
            pairs.positive_answers[: args.pairs],
            pairs.negative_answers[: args.pairs],
        )
        vectors = caa_vectors(adapter, *part, args.layers, tokenizer=loaded.tokenizer)
        for layer in args.layers:
            vector = vectors.restricted([layer])
            begun = time.process_time()
            seen = search(known, adapter, vector, args.kl)
            spent = time.process_time() - begun
            strength = min(seen, key=lambda one: abs(seen[one] - args.kl))
            tried, bisection = 0, 0.0
            if args.bisection:
                begun = time.process_time()
                tried = bisected(known, adapter, vector, args.kl, max(seen))
                bisection = time.process_time() - begun
            (found,) = unseen.under([tuple(vector.plan(adapter, strength).interventions)])
            moved.append(dose_quantile(found.kl))
            print(
                f"{name:18} {layer:5} {strength:8.3f} {moved[-1]:9.3f} {len(seen):6} {spent:6.2f} "
                f"{tried:9} {bisection:6.2f}",
                flush=True,
            )
    mean = sum(moved) / len(moved)
    print(
        f"unseen: {min(moved):.2f} to {max(moved):.2f} nats, mean {mean:.2f}; "
        f"the farthest from it by {100 * max(abs(one / mean - 1) for one in moved):.0f} %"
    )


if __name__ == "__main__":
    main()
