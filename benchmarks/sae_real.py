"""Behaviors of SmolLM2-135M by an autoencoder that is trained here, and by the plain probe, on chats held out.

The autoencoder is trained once, on chats of the model with itself and on paragraphs of the manuals that Debian's
packages bring. MECHANEX_HOME says where the model is and where the autoencoder is kept.

python benchmarks/sae_real.py [--steps 400]
"""

from __future__ import annotations

import argparse
import json
import random
import resource
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from manuals import paragraphs

from mechanex.engine.datasets import read_pairs
from mechanex.engine.generate import generate_batch
from mechanex.engine.models import adapter_for
from mechanex.engine.models.resolve import load
from mechanex.engine.sae.autoencoder import SparseAutoencoder
from mechanex.engine.sae.create import create
from mechanex.engine.sae.detectors import auroc
from mechanex.engine.sae.examples import read_examples
from mechanex.engine.sae.read import read_sae
from mechanex.engine.sae.train import train_sae
from mechanex.engine.sae.train_step import TrainingSettings
from mechanex.home import mechanex_home

BEHAVIORS = Path(__file__).with_name("sae_behaviors")
MODEL = "smollm2-135m"
POINT = "resid.20"
BATCH = 512
CHATS, PARAGRAPHS = 600, 2000
TASKS = (
    "Tell me a short story about {}.",
    "What do you think about {}?",
    "Write a letter to a friend about {}.",
    "Give me advice about {}.",
    "Why do people care about {}?",
    "I had a bad day because of {}.",
    "I had a wonderful day because of {}.",
    "Explain {} to a child.",
    "Write a few lines of dialogue between two people who talk about {}.",
    "What should I know about {}?",
)
TOPICS = (
    "rain", "my neighbor", "a lost key", "cooking rice", "the sea", "trains", "an old dog", "birthdays", "money",
    "learning to swim", "the moon", "a broken window", "bread", "my sister", "winter", "a job interview", "cats",
    "football", "the news", "a long walk", "music", "sleep", "my teacher", "gardens", "a missed bus", "books",
    "chess", "the dentist", "mountains", "tea", "a wedding", "traffic", "paintings", "my phone", "a new town",
    "bees", "homework", "coffee", "ghosts", "a bicycle", "the library", "apples", "a storm", "my boss", "spiders",
    "dancing", "maps", "a letter that never came", "horses", "exams", "snow", "a secret", "the market", "fishing",
    "candles", "a noisy street", "doctors", "bridges", "my grandmother", "computers", "soup", "the theater",
    "a fire alarm", "rivers", "shoes", "a bad joke", "lemons", "an airport", "clocks", "the stars", "friendship",
    "a flat tire", "poetry", "insects", "the sun", "a boring meeting", "cheese", "a promise", "trees", "the past",
    "a stolen wallet", "elephants", "running", "mirrors", "an argument", "chocolate", "the forest", "time",
    "a surprise", "glass", "volcanoes", "my cousin", "a hospital", "kites", "salt", "the future", "a lie",
    "museums", "pigeons", "silence",
)  # fmt: skip


def cpu_seconds() -> float:
    """CPU time of this process: on a shared machine the clock says little."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def samples(loaded: Any, n: int) -> list[str]:
    """Chats of the model with itself: a question made of a task and a topic, and its sampled answer."""
    asked = [task.format(topic) for topic in TOPICS for task in TASKS]
    random.Random(0).shuffle(asked)
    chats = [[{"role": "user", "content": question}] for question in asked[:n]]
    found: list[str] = []
    for first in range(0, n, 32):
        found += generate_batch(
            loaded.model,
            loaded.tokenizer,
            chats[first : first + 32],
            max_tokens=64,
            temperature=1.0,
            seed=first,
        )
    return found


def train(out: Path, steps: int, features: int, k: int) -> None:
    """Trains the autoencoder and writes it, with its report, to ``out``."""
    loaded = load(MODEL, backend="transformers", dtype="bfloat16")
    begun = cpu_seconds()
    chats = out.with_suffix(".chats.json")  # a run that was stopped goes on with the same
    if not chats.exists():
        chats.parent.mkdir(parents=True, exist_ok=True)
        chats.write_text(json.dumps(samples(loaded, CHATS)))
    texts = [*json.loads(chats.read_text()), *islice(paragraphs(seed=0), PARAGRAPHS)]
    random.Random(1).shuffle(texts)
    settings = TrainingSettings(
        "topk",
        n_features=features,
        k=k,
        steps=steps,
        batch=BATCH,
        buffer=32 * BATCH,
        lr=1e-3,
        context=96,
        dead_after=100_000,
    )
    trained = train_sae(
        loaded.model,
        texts,
        settings=settings,
        point=POINT,
        tokenizer=loaded.tokenizer,
        out=out,
        checkpoint=out.with_suffix(".checkpoint"),
        dtype=torch.bfloat16,
        progress=True,
    )
    trained.report["cpu_seconds"] = round(cpu_seconds() - begun)
    (out / "report.json").write_text(json.dumps(trained.report, indent=1))


@dataclass(frozen=True)
class Separation:
    """How well a detector tells answers apart, each with its 95 % interval.

    Args:
        folds: AUROC of the 40 pairs, each by a detector made without it.
        held_out: AUROC of the 16 pairs that made no part of it.
        detected: share of answers with the behavior, in the folds, of which a token is above the threshold for 1 %
            false alarms per answer of 64 tokens.
    """

    folds: tuple[float, float, float]
    held_out: tuple[float, float, float]
    detected: float


def separation(loaded: Any, sae: SparseAutoencoder, name: str) -> dict[str, Separation]:
    """Makes a behavior of the 40 pairs of a file and measures both of its detectors on the 16 held out."""
    adapter = adapter_for(loaded.model)
    made, held = (read_pairs(BEHAVIORS / f"{name}.jsonl", split=split) for split in ("train", "heldout"))
    sides = made.prompts, made.positive_answers, made.negative_answers
    # How it would be corrected is not measured here.
    behavior = create(adapter, name, *sides, sae=sae, correction="cap", tokenizer=loaded.tokenizer)
    assert sae.point is not None
    sides = held.prompts, held.positive_answers, held.negative_answers
    examples = read_examples(adapter, sae.point, *sides, tokenizer=loaded.tokenizer)
    found = {}
    for kind, detector in (("features", behavior.features), ("probe", behavior.probe)):
        if detector is None:
            continue
        means = [float(one.mean()) for one in examples.by_answer(detector.scores(examples.x))]
        figures = behavior.figures[f"{kind}_figures"]
        folds = figures["auroc"], *figures["auroc_interval"]
        found[kind] = Separation(
            folds, auroc(means[: examples.n], means[examples.n :]), figures["detected"]["rate"]
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=400, help="of 512 activations")
    parser.add_argument("--features", type=int, default=4096)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="the autoencoder's folder; by default in MECHANEX_HOME")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    out = chosen.out if chosen.out is not None else mechanex_home() / "saes" / MODEL
    if not (out / "cfg.json").exists():
        train(out, chosen.steps, chosen.features, chosen.k)
    report = json.loads((out / "report.json").read_text())
    del report["settings"]
    print(json.dumps(report, indent=1))
    loaded = load(MODEL, backend="transformers", dtype="bfloat16")
    sae = read_sae(out)
    for path in sorted(BEHAVIORS.glob("*.jsonl")):
        for kind, found in separation(loaded, sae, path.stem).items():
            shown = [
                f"{area:.3f} ({low:.3f} to {high:.3f})" for area, low, high in (found.folds, found.held_out)
            ]
            print(
                f"{path.stem}, {kind}: AUROC {shown[0]} in five folds, {shown[1]} of the pairs held out; "
                f"{found.detected:.0%} of answers detected"
            )


if __name__ == "__main__":
    main()
