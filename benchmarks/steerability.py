"""How far steering moves the tone of the bundled model's texts, and what it costs in perplexity.

Layer and strength are chosen on the train split alone; the figures are of the held-out prompts.

    python benchmarks/steerability.py --json steerability.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import tones

from mechanex.bundled import data_path, model_path
from mechanex.engine.caa import caa_vectors
from mechanex.engine.datasets import read_pairs
from mechanex.engine.generate import generate_batch
from mechanex.engine.models.resolve import LoadedModel, load
from mechanex.engine.score import perplexity
from mechanex.engine.vectors import SteeringVector

PAIRS = ("calm_angry", "kind_rude", "hopeful_gloomy")
STRENGTHS = (0.65, 0.75, 0.85, 1.0, 1.25)
MAX_TOKENS = 40
# The bounds that the held-out figures must keep; choosing on the train split keeps a margin.
MOST_PERPLEXITY, MARGIN = 2.0, 0.8
LEAST_RISE, LEAST_SHARE = 0.5, 0.9


@dataclass(frozen=True)
class Texts:
    """Completions of some prompts, and their perplexity under the unsteered model."""

    completions: list[str]
    perplexity: float

    def share(self, tone: str, judge: Any = tones.is_tone) -> float:
        """Returns the share of the completions that are of the tone."""
        return sum(judge(text, tone) for text in self.completions) / len(self.completions)


@dataclass(frozen=True)
class Figures:
    """What steering to one tone does on the held-out prompts."""

    tone: str
    layer: int
    strength: float
    unsteered: float
    steered: float
    by_words: float
    by_classifier: float
    perplexity_unsteered: float
    perplexity_steered: float

    @property
    def ratio(self) -> float:
        """Perplexity of the steered texts over that of the unsteered ones."""
        return self.perplexity_steered / self.perplexity_unsteered

    @property
    def passes(self) -> bool:
        """Whether the tone rises enough at a bearable perplexity."""
        rises = self.steered - self.unsteered >= LEAST_RISE or self.steered > LEAST_SHARE
        return rises and self.ratio <= MOST_PERPLEXITY


def sample(
    loaded: LoadedModel,
    prompts: Sequence[str],
    per_prompt: int,
    *,
    seed: int,
    vector: SteeringVector | None = None,
    strength: float = 1.0,
) -> Texts:
    """Returns seeded samples of every prompt at temperature 1, the library's default sampling."""
    repeated = [prompt for prompt in prompts for _ in range(per_prompt)]
    texts = generate_batch(
        loaded.model,
        loaded.tokenizer,
        repeated,
        max_tokens=MAX_TOKENS,
        seed=seed,
        vector=vector,
        strength=strength,
    )
    completions = [text[len(prompt) :] for text, prompt in zip(texts, repeated, strict=True)]
    written = [pair for pair in zip(repeated, completions, strict=True) if pair[1].strip()]
    asked, answers = zip(*written, strict=True)
    return Texts(completions, perplexity(loaded.model, asked, answers, loaded.tokenizer))


def choose(
    loaded: LoadedModel, vectors: SteeringVector, tone: str, sign: int, prompts: Sequence[str]
) -> tuple[int, float]:
    """Returns the layer and strength with the highest share of the tone at a bearable perplexity."""
    plain = sample(loaded, prompts, 2, seed=1)
    found: list[tuple[float, int, float]] = []
    for layer in vectors.layers:
        for strength in STRENGTHS:
            vector = vectors.restricted([layer])
            texts = sample(loaded, prompts, 2, seed=2, vector=vector, strength=sign * strength)
            ratio = texts.perplexity / plain.perplexity
            if ratio <= MARGIN * MOST_PERPLEXITY:
                found.append((texts.share(tone), layer, strength))
            if ratio > MOST_PERPLEXITY:
                break
    _, layer, strength = max(found)
    return layer, strength


def measure(loaded: LoadedModel, name: str, per_prompt: int, n_choose: int) -> list[Figures]:
    """Returns the figures of both tones of a contrastive dataset."""
    train = read_pairs(data_path(name), split="train")
    heldout = read_pairs(data_path(name), split="heldout")
    layers = range(3, int(loaded.model.config.num_hidden_layers))
    vectors = caa_vectors(
        loaded.model, train.prompts, train.positive_answers, train.negative_answers, layers, loaded.tokenizer
    )
    train_prompts, prompts = [str(p) for p in train.prompts[:n_choose]], [str(p) for p in heldout.prompts]
    plain = sample(loaded, prompts, per_prompt, seed=1_000_000)
    figures = []
    for sign, tone in zip((1, -1), name.split("_"), strict=True):
        layer, strength = choose(loaded, vectors, tone, sign, train_prompts)
        vector = vectors.restricted([layer])
        texts = sample(loaded, prompts, per_prompt, seed=2_000_000, vector=vector, strength=sign * strength)
        figures.append(
            Figures(
                tone=tone,
                layer=layer,
                strength=sign * strength,
                unsteered=plain.share(tone),
                steered=texts.share(tone),
                by_words=texts.share(tone, lambda text, tone: tones.by_words(text) == tone),
                by_classifier=texts.share(tone, lambda text, tone: tones.classifier()(text) == tone),
                perplexity_unsteered=plain.perplexity,
                perplexity_steered=texts.perplexity,
            )
        )
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=str(model_path("mx-tiny")), help="a folder with the model")
    parser.add_argument("--per-prompt", type=int, default=8, help="completions of every held-out prompt")
    parser.add_argument(
        "--choose", type=int, default=32, help="train prompts for choosing layer and strength"
    )
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    # Batches this small gain nothing from threads.
    torch.set_num_threads(1)
    loaded = load(args.model, backend="transformers")
    judges = tones.accuracy()
    print("judges, share of fresh texts found: " + ", ".join(f"{k} {v:.3f}" for k, v in judges.items()))
    print(
        "tone      layer  strength  unsteered  steered  (words, classifier)  perplexity        ratio  passes"
    )
    figures = []
    for name in PAIRS:
        for f in measure(loaded, name, args.per_prompt, args.choose):
            figures.append(f)
            print(
                f"{f.tone:9s} {f.layer:5d}  {f.strength:8.2f}  {f.unsteered:9.3f}  {f.steered:7.3f}  "
                f"({f.by_words:.3f}, {f.by_classifier:.3f})       "
                f"{f.perplexity_unsteered:.2f} -> {f.perplexity_steered:.2f}  {f.ratio:10.2f}  "
                f"{'yes' if f.passes else 'NO'}",
                flush=True,
            )
    if args.json:
        rows = [asdict(f) | {"ratio": f.ratio, "passes": f.passes} for f in figures]
        args.json.write_text(json.dumps({"judges": judges, "tones": rows}, indent=1) + "\n")
    sys.exit(0 if sum(f.passes for f in figures) >= 3 else 1)


if __name__ == "__main__":
    main()
