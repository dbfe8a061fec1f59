"""The demo: three tones of the bundled model steered at strengths from -2 to 2, and what that did."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm.auto import tqdm

from ..bundled import data_path
from ..commands.console import echo_json, json_text
from ..engine.caa import caa_vectors
from ..engine.datasets import ContrastivePairs, read_pairs
from ..engine.models import adapter_for
from ..engine.models.resolve import LoadedModel, load
from ..engine.vectors import SteeringVector
from .measure import Measurement, Steering, measure
from .report import print_report, save_plot

__all__ = ["STRENGTHS", "TONES", "Tone", "run_demo"]

MODEL = "mx-tiny"
STRENGTHS = (-2.0, -1.0, 0.0, 1.0, 2.0)
# What strength 2 may be, in mean-difference vectors, and what the choice on the train split keeps to.
CANDIDATES = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0)
MOST_PERPLEXITY = 1.7
N_TRAIN_PROMPTS = 32


@dataclass(frozen=True)
class Tone:
    """One tone and where its vector comes from.

    Args:
        name: the tone, as in ``bundled.tone_words``.
        dataset: the contrastive dataset.
        sign: 1 where the tone is the dataset's positive side, -1 where it is the negative one.
    """

    name: str
    dataset: str
    sign: int


TONES = (
    Tone("angry", "calm_angry", -1),
    Tone("hopeful", "hopeful_gloomy", 1),
    Tone("gloomy", "hopeful_gloomy", -1),
)


def run_demo(out: Path, *, seed: int = 0, as_json: bool = False) -> list[Measurement]:
    """Computes vectors, samples, measures, prints tables, and writes ``steering.json`` and ``steering.png``.

    For each tone, the layer and the unit of strength are those at which strength 2 turns the most completions of train
    prompts while their perplexity stays below 1.7 times the unsteered one. The figures are of the held-out prompts.

    Args:
        out: folder for the two files; made if missing.
        seed: of the sampling.
        as_json: print the figures as they are in ``steering.json``, in place of the tables.

    Returns:
        One measurement per tone and strength.
    """
    started = time.perf_counter()
    measured: list[Measurement] = []
    chosen: list[Steering] = []
    prompts: dict[str, list[str]] = {}
    out.mkdir(parents=True, exist_ok=True)
    with _one_thread():
        loaded = load(MODEL, backend="transformers", device="cpu", dtype="float32")
        for tone in tqdm(TONES, desc="steering", unit="tone", disable=not sys.stderr.isatty()):
            train, held_out = (
                read_pairs(data_path(tone.dataset), split=part) for part in ("train", "heldout")
            )
            prompts[tone.name] = [str(prompt) for prompt in held_out.prompts]
            steering, vector = _choose(loaded, tone, train, seed)
            chosen.append(steering)
            measured += [
                measure(loaded, tone.name, prompts[tone.name], vector, strength, seed)
                for strength in STRENGTHS
            ]
    report = {
        "model": MODEL,
        "seed": seed,
        "steering": [asdict(steering) for steering in chosen],
        "measurements": [asdict(one) for one in measured],
    }
    figures = out / "steering.json"
    figures.write_text(json_text(report) + "\n", encoding="utf-8")
    plot = save_plot(measured, out / "steering.png")
    if as_json:
        echo_json(report)
    else:
        print_report(measured, chosen, prompts, plot, figures, time.perf_counter() - started)
    return measured


def _choose(
    loaded: LoadedModel, tone: Tone, train: ContrastivePairs, seed: int
) -> tuple[Steering, SteeringVector]:
    """The steering of a tone, and its vector in units of strength 1."""
    n_layers = adapter_for(loaded.model).n_layers
    layers = range(n_layers // 3, n_layers - 1)
    vectors = tone.sign * caa_vectors(
        loaded.model,
        train.prompts,
        train.positive_answers,
        train.negative_answers,
        list(layers),
        loaded.tokenizer,
    )
    # Lines of one kind stand together: every third or so shows all kinds.
    step = max(len(train) // N_TRAIN_PROMPTS, 1)
    prompts = [str(prompt) for prompt in train.prompts[::step]]
    # Another seed than the one whose figures are shown.
    seed += len(train)
    plain = measure(loaded, tone.name, prompts, vectors, 0.0, seed)
    best, best_share = (layers[0], CANDIDATES[0]), -1.0
    for layer in layers:
        for strength in CANDIDATES:
            found = measure(loaded, tone.name, prompts, vectors.restricted([layer]), strength, seed)
            if found.perplexity > MOST_PERPLEXITY * plain.perplexity:
                break
            if found.share > best_share:
                best, best_share = (layer, strength), found.share
    layer, strength = best
    unit = strength / max(STRENGTHS)
    vector = vectors.restricted([layer])
    return Steering(tone.name, layer, unit, vector.norm()), unit * vector


@contextmanager
def _one_thread() -> Iterator[None]:
    """The model's products are so small that threads only wait for each other, on a busy machine for seconds."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)
