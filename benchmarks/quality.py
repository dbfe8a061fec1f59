"""What tuned steering reaches on a real model, behavior by behavior, and what it costs: docs/quality.md.

    python benchmarks/quality.py                       # all behaviors, 30 validation and 30 test prompts
    python benchmarks/quality.py --prompts 10 --max-tokens 32 --behaviors flattery

One JSON file per behavior goes to --out and isn't made again; the page is written from those that are there.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks" / "behaviors"))

from scorers import SCORERS  # noqa: E402

from mechanex.engine.caa import default_layer  # noqa: E402
from mechanex.engine.datasets import ContrastivePairs, prompt_of, read_lines, read_pairs  # noqa: E402
from mechanex.engine.doses.ability import read_questions, right_answers  # noqa: E402
from mechanex.engine.doses.dose import Dose, Edited  # noqa: E402
from mechanex.engine.doses.families import families_of, worth  # noqa: E402
from mechanex.engine.doses.intervals import bootstrap, mean_of  # noqa: E402
from mechanex.engine.doses.scorers import TextScorer  # noqa: E402
from mechanex.engine.doses.sweep import PAIR_KL, sweep  # noqa: E402
from mechanex.engine.doses.swept import Setting  # noqa: E402
from mechanex.engine.doses.written import costs_of, write  # noqa: E402
from mechanex.engine.models import adapter_for  # noqa: E402
from mechanex.engine.models.packaged import PACKAGED  # noqa: E402
from mechanex.engine.models.resolve import LoadedModel, load  # noqa: E402
from mechanex.engine.sampling import Options  # noqa: E402
from mechanex.engine.text import Prompt  # noqa: E402
from mechanex.engine.vectors import SteeringVector  # noqa: E402

BEHAVIORS = ROOT / "benchmarks" / "behaviors"
MODEL = "smollm2-135m"
MOST = 1.5  # of the plain model's perplexity: where both ways are compared
STRENGTHS = (0.7, 1.0, 1.4)  # times the strength at which a dose should cost that
MORE = 2  # strengths that are tried beyond them, where all cost less or all cost more
# The lexicon leaves little room above what this model writes by itself: it is steered the other way.
REVERSED = ("cheerful_gloomy",)
# Where scores end.
ENDS = {"cheerful_gloomy": (-1.0, 1.0), "present_past": (-1.0, 1.0), "french_english": (-1.0, 1.0)} | {
    name: (0.0, 1.0) for name in ("flattery", "refusal")
}


class Curve:
    """Texts of one way of steering on the test prompts, at several strengths: scores and costs."""

    def __init__(self, loaded: LoadedModel, prompts: Sequence[Prompt], scorer: TextScorer, options: Options):
        self.adapter, self.tokenizer = adapter_for(loaded.model), loaded.tokenizer
        self.prompts, self.scorer, self.options = prompts, scorer, options

    def of(self, settings: Sequence[Edited]) -> list[dict[str, Any]]:
        """Of each setting its scores by prompt, perplexity under the plain model, repetition and first text."""
        texts = write(self.adapter, self.tokenizer, self.prompts, settings, self.options)
        costs = costs_of(self.adapter, texts)
        return [
            {
                "scores": [self.scorer(one.text) for one in answers],
                "perplexity": math.exp(-float(logprobs.sum()) / max(1.0, float(counts.sum()))),
                "repetition": sum(one.repetition for one in answers) / len(answers),
                "example": answers[0].text,
            }
            for answers, (logprobs, counts) in zip(texts, costs, strict=True)
        ]

    def along(
        self, dose: Dose, vectors: SteeringVector, plain: dict[str, Any]
    ) -> tuple[list[dict[str, Any]], list[float]]:
        """A dose at several strengths, so that one costs less than MOST and one more, and the strengths."""
        factors = list(STRENGTHS)
        found = self.of([replace(dose, strength=dose.strength * f).of(vectors) for f in factors])
        for _ in range(MORE):
            prices = [one["perplexity"] / plain["perplexity"] for one in found]
            if min(prices) <= MOST < max(prices):
                break
            factor = factors[-1] * 1.6 if max(prices) <= MOST else factors[0] / 1.6
            (more,) = self.of([replace(dose, strength=dose.strength * factor).of(vectors)])
            place = len(found) if factor > 1 else 0
            found.insert(place, more)
            factors.insert(place, factor)
        return found, factors


def at_price(plain: dict[str, Any], steered: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The effect where perplexity is MOST times plain, interpolated between the strengths, with its interval."""
    prices = np.array([1.0, *(one["perplexity"] / plain["perplexity"] for one in steered)])
    scores = np.array([plain["scores"], *(one["scores"] for one in steered)])

    def effect(at: np.ndarray) -> float:
        effects = scores[:, at].mean(1) - scores[0, at].mean()
        for i in range(1, len(prices)):
            if prices[i] > MOST:
                span = math.log(prices[i] / prices[i - 1])
                share = math.log(MOST / prices[i - 1]) / span if span > 0 else 0.0
                share = min(max(share, 0.0), 1.0)
                return float(effects[i - 1] + share * (effects[i] - effects[i - 1]))
        return float(effects[-1])

    found = bootstrap(effect, scores.shape[1])
    return {"value": found.value, "low": found.low, "high": found.high, "dearest": float(prices.max())}


def measured(name: str, loaded: LoadedModel, args: argparse.Namespace, out: Path) -> dict[str, Any]:
    """Everything of one behavior."""
    begun, judge, adapter = time.process_time(), SCORERS[name], adapter_for(loaded.model)
    pairs = read_pairs(BEHAVIORS / name / "pairs.jsonl")
    sign = -1.0 if name in REVERSED else 1.0
    if sign < 0:
        pairs = ContrastivePairs(pairs.prompts, pairs.negative_answers, pairs.positive_answers)

    def scorer(text: str) -> float:
        return sign * judge(text)

    validation, test = (
        read_lines(BEHAVIORS / name / f"{split}.jsonl", prompt_of, None)[:n]
        for split, n in (("validation", args.validation), ("test", args.prompts))
    )
    usual = default_layer(adapter.n_layers)
    layers = sorted({*range(args.first_layer, adapter.n_layers, args.layer_step), usual})
    swept = sweep(
        adapter,
        pairs,
        layers=layers,
        strengths=args.strengths,
        edits=args.edits,
        tokens=args.tokens,
        methods=args.methods,
        scorer=scorer,
        validation=validation,
        most_perplexity=MOST,
        finalists=args.finalists,
        most_evaluations=args.evaluations,
        max_tokens=args.max_tokens,
        tokenizer=loaded.tokenizer,
        checkpoint=out / f"{name}.sweep.json",
    )
    dose, vectors = swept.chosen.dose, swept.vectors[swept.chosen.dose.method]
    options = Options(max_tokens=args.max_tokens, seed=1)
    curve = Curve(loaded, test, scorer, options)
    (plain,) = curve.of([()])
    usual_dose = Dose(usual, usual_strength(swept.settings, usual))
    doses = {"default": usual_dose, "tuned": dose}
    ways = {way: curve.along(one, swept.vectors[one.method], plain) for way, one in doses.items()}
    dosed = ways["tuned"][0][ways["tuned"][1].index(1.0)]
    questions = read_questions(BEHAVIORS / "ability.jsonl")
    right = right_answers(
        adapter,
        loaded.tokenizer,
        questions[:: max(1, len(questions) // args.questions)],
        [(), dose.of(vectors)],
    ).double()
    lost = mean_of((right[0] - right[1]).tolist())
    return {
        "behavior": name,
        "recommendation": swept.sentence,
        "dose": str(dose),
        "chosen": swept.chosen.as_dict(),
        "settings": len(swept.settings),
        "evaluations": swept.evaluations,
        "sign": sign,
        "plain": {key: plain[key] for key in ("perplexity", "repetition", "example")}
        | {"score": sign * float(np.mean(plain["scores"]))},
        "default": at_price(plain, ways["default"][0]),
        "tuned": at_price(plain, ways["tuned"][0]),
        "curves": {
            way: [
                {
                    "strength": one.strength * factor,
                    "effect": float(np.mean(at["scores"]) - np.mean(plain["scores"])),
                    "perplexity": at["perplexity"] / plain["perplexity"],
                    "repetition": at["repetition"],
                }
                for at, factor in zip(*ways[way], strict=True)
            ]
            for way, one in doses.items()
        },
        "tuned_at_1": {
            "effect": float(np.mean(dosed["scores"]) - np.mean(plain["scores"])),
            "perplexity": dosed["perplexity"] / plain["perplexity"],
            "repetition": dosed["repetition"],
            "example": dosed["example"],
        },
        "ability": {
            "plain": float(right[0].mean()),
            "lost": lost.value,
            "low": lost.low,
            "high": lost.high,
            "questions": right.shape[1],
        },
        "cpu_seconds": time.process_time() - begun,
        "run": {
            "validation": len(validation),
            "prompts": len(test),
            "max_tokens": args.max_tokens,
            "layers": layers,
            "finalists": args.finalists,
            "dtype": args.dtype,
            "edits": args.edits,
            "methods": args.methods,
        },
    }


def usual_strength(settings: Sequence[Setting], layer: int) -> float:
    """Where adding to all tokens at a layer should cost MOST, by the answers that were given."""
    tried = [
        one
        for one in settings
        if one.examples
        and replace(one.dose, strength=1.0, method="caa") == Dose(layer, 1.0)
        and one.dose.method == "caa"
    ]
    if not tried:
        raise SystemExit(
            "the usual strength is that of caa, add and all: --methods, --edits and --tokens have to keep them."
        )
    (family,) = families_of(tried)
    prices, gains = [one.kl for one in family.settings], [one.gain for one in family.settings]
    return worth(family.strengths, prices, gains, PAIR_KL * math.log(MOST))[0]


def page(found: list[dict[str, Any]], note: str = "") -> str:
    """docs/quality.md."""
    reached = [one for one in found if won(one)]
    missing = [name for name in SCORERS if name not in {one["behavior"] for one in found}]
    runs = sorted({json.dumps(one["run"]) for one in found})
    rows = [
        "| towards | tuned dose | default, effect at 1.5 × | tuned, effect at 1.5 × | most | at least 1.5 times | "
        "ability lost |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in found:
        default, tuned, ability = one["default"], one["tuned"], one["ability"]
        rows.append(
            f"| {name_of(one)} | {one['dose']} | {interval(default)} | {interval(tuned)} | "
            f"{most_of(one)} | {'yes' if won(one) else 'no'} | {100 * ability['lost']:.1f} "
            f"[{100 * ability['low']:.1f}, {100 * ability['high']:.1f}] of {100 * ability['plain']:.0f} % |"
        )
    texts = []
    for one in found:
        shown = (" ".join(one[which]["example"].split()) for which in ("plain", "tuned_at_1"))
        texts += [f"**{name_of(one)}**", "", *(f"> {text}\n" for text in shown)]
    settings = "; ".join(
        f"{run['validation']} validation and {run['prompts']} test prompts, answers of {run['max_tokens']} tokens, "
        f"layers {', '.join(map(str, run['layers']))}, {run['finalists']} finalists, {run['dtype']}"
        for run in map(json.loads, runs)
    )
    cpu = sum(one["cpu_seconds"] for one in found) / max(1, len(found))
    return "\n".join(
        [
            "# Quality",
            "",
            "What tuned steering reaches on a real model, and what it costs. `make quality` writes this page; it takes",
            "hours on two cores. The judges are no language models",
            "([benchmarks/behaviors/scorers.py](../benchmarks/behaviors/scorers.py)): vaderSentiment, lists of words,",
            "rules. Effects are differences of mean scores to the plain model's texts on the same test prompts, which",
            "nothing was chosen on.",
            "",
            f"Model: SmolLM2-135M-Instruct, weights `{PACKAGED[MODEL].weights_sha256}`.",
            f"Run: {settings}. Sampling at temperature 1, top-k 50. {cpu:.0f} seconds of one core a behavior.",
            *([note] if note else []),
            "",
            "**Default** is the mean difference of the pairs that the tuned vector is made from, added to all tokens",
            "at the documented layer; **tuned** is the dose that the sweep chose on validation prompts. Both are read",
            "off at 1.5 times the plain model's perplexity, between the strengths that were run, with 95 % intervals",
            "of the bootstrap over prompts; where all of a way's strengths cost less, the dearest one counts. Towards",
            "is the side that effects are counted for; most is what a score that ends somewhere leaves room for.",
            "",
            *rows,
            "",
            f"At least 1.5 times the default's effect: **{len(reached)} of {len(found)}** behaviors that were run.",
            *([f"Not run: {', '.join(name.replace('_', '–') for name in missing)}."] if missing else []),
            "Intervals are wide where prompts are few: a yes or no in such a row is a reading, not a finding.",
            "",
            "## Texts",
            "",
            "The first test prompt, plain and under the tuned dose.",
            "",
            *texts,
        ]
    )


def won(one: dict[str, Any]) -> bool:
    """Whether the tuned dose reaches 1.5 times the default's effect, with an interval that leaves 0 out."""
    tuned, default = one["tuned"], one["default"]
    return bool(tuned["low"] > 0 and tuned["value"] >= 1.5 * default["value"])


def name_of(one: dict[str, Any]) -> str:
    """A behavior by the side that the model is steered to."""
    sides = str(one["behavior"]).split("_")
    if len(sides) == 1:
        return sides[0]
    first, second = sides if one.get("sign", 1.0) > 0 else sides[::-1]
    return f"{first} (not {second})"


def most_of(one: dict[str, Any]) -> str:
    """The largest effect that the behavior's score has room for."""
    ends = ENDS.get(one["behavior"])
    if ends is None:
        return "–"
    return f"{ends[1] - one['plain']['score'] if one.get('sign', 1.0) > 0 else one['plain']['score'] - ends[0]:.2f}"


def interval(found: dict[str, float]) -> str:
    told = f"{found['value']:+.2f} [{found['low']:+.2f}, {found['high']:+.2f}]"
    return told if found["dearest"] >= MOST else f"{told} at {found['dearest']:.2f} ×"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--behaviors", nargs="*", default=list(SCORERS), choices=list(SCORERS))
    parser.add_argument("--prompts", type=int, default=30)
    parser.add_argument("--validation", type=int, default=30, help="prompts to choose on")
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.5, 1.0, 2.0, 4.0])
    parser.add_argument("--edits", nargs="+", default=["add", "clamp", "norm"])
    parser.add_argument("--tokens", nargs="+", default=["all", "generated"])
    parser.add_argument("--methods", nargs="+", default=["caa"])
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--finalists", type=int, default=8)
    parser.add_argument("--evaluations", type=float, default=60.0, help="what a sweep may cost")
    parser.add_argument("--first-layer", type=int, default=6)
    parser.add_argument("--layer-step", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "quality")
    parser.add_argument("--note", default="", help="a line about the run, for the page")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "quality.md")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    todo = [name for name in args.behaviors if not (args.out / f"{name}.json").exists()]
    loaded = load(MODEL, backend="transformers", dtype=args.dtype) if todo else None
    for name in todo:
        assert loaded is not None
        found = measured(name, loaded, args, args.out)
        (args.out / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(f"{name}: {found['recommendation']} ({found['cpu_seconds']:.0f} s)", flush=True)
    there = [args.out / f"{name}.json" for name in SCORERS]
    made = [json.loads(path.read_text(encoding="utf-8")) for path in there if path.exists()]
    args.page.write_text(page(made, args.note) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
