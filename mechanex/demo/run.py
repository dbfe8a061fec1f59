"""The demo: three tones of the bundled model steered at strengths around their calibrated dose, and what that did."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..bundled import data_path
from ..commands.console import json_text
from ..engine.caa import caa_vectors
from ..engine.datasets import ContrastivePairs, read_pairs
from ..engine.doses.calibrate import calibrate
from ..engine.models import adapter_for
from ..engine.models.resolve import LoadedModel, load
from ..engine.vectors import SteeringVector
from .measure import Measurement, Steering, measure
from .report import Finished, save_plot
from .tones import N_LAYERS, STRENGTHS, TONES, Tone

__all__ = ["run_demo"]

MODEL = "mx-tiny"
# The dose: 95 % of tokens move by at most as many nats. What the choice of a layer keeps to beside.
KL = 1.0
MOST_PERPLEXITY = 1.7
N_TRAIN_PROMPTS = 32

Progress = Callable[[], Any]


def run_demo(out: Path, *, seed: int = 0, progress: Progress = lambda: None) -> Finished:
    """Computes vectors, calibrates, samples, measures, and writes ``steering.json`` and ``steering.png``.

    Strength 1 of each vector is its calibrated dose. A tone's layer is the one where that dose turns the most
    completions of train prompts while their perplexity stays below 1.7 times the unsteered one. The figures are of the
    held-out prompts.

    Args:
        out: folder for the two files; made if missing.
        seed: of the sampling.
        progress: called after each step.

    Returns:
        What was measured, ready to be shown.
    """
    started = time.perf_counter()
    measured: list[Measurement] = []
    chosen: list[Steering] = []
    prompts: dict[str, list[str]] = {}
    out.mkdir(parents=True, exist_ok=True)
    with _one_thread():
        loaded = load(MODEL, backend="transformers", device="cpu", dtype="float32")
        progress()
        for tone in TONES:
            train, held_out = (
                read_pairs(data_path(tone.dataset), split=part) for part in ("train", "heldout")
            )
            prompts[tone.name] = [str(prompt) for prompt in held_out.prompts]
            steering, vector = _choose(loaded, tone, train, seed, progress)
            chosen.append(steering)
            for strength in STRENGTHS:
                measured.append(measure(loaded, tone.name, prompts[tone.name], vector, strength, seed))
                progress()
    figures = {
        "model": MODEL,
        "seed": seed,
        "steering": [asdict(steering) for steering in chosen],
        "measurements": [asdict(one) for one in measured],
    }
    path = out / "steering.json"
    path.write_text(json_text(figures) + "\n", encoding="utf-8")
    plot = save_plot(measured, out / "steering.png")
    return Finished(figures, measured, chosen, prompts, plot, path, time.perf_counter() - started)


def _choose(
    loaded: LoadedModel, tone: Tone, train: ContrastivePairs, seed: int, progress: Progress
) -> tuple[Steering, SteeringVector]:
    """The steering of a tone, and its vector, whose strength 1 is the calibrated dose."""
    n_layers = adapter_for(loaded.model).n_layers
    layers = sorted({n_layers // 3 + n * n_layers // 6 for n in range(N_LAYERS)})
    vectors = tone.sign * caa_vectors(
        loaded.model,
        train.prompts,
        train.positive_answers,
        train.negative_answers,
        layers,
        loaded.tokenizer,
    )
    progress()
    # Lines of one kind stand together: every third or so shows all kinds.
    step = max(len(train) // N_TRAIN_PROMPTS, 1)
    prompts = [str(prompt) for prompt in train.prompts[::step]]
    # Another seed than the one whose figures are shown.
    seed += len(train)
    plain = measure(loaded, tone.name, prompts, vectors, 0.0, seed)
    progress()
    written = [pair for pair in zip(prompts, plain.completions, strict=True) if pair[1]]
    best: tuple[Steering, SteeringVector] | None = None
    best_rank = (False, -1.0)
    for layer in layers:
        vector = vectors.restricted([layer])
        record = calibrate(
            loaded.model,
            vector,
            KL,
            prompts=[prompt for prompt, _ in written],
            answers=[f" {completion}" for _, completion in written],
            tokenizer=loaded.tokenizer,
        ).calibration
        assert record is not None
        progress()
        dose = record.strength * vector
        found = measure(loaded, tone.name, prompts, dose, 1.0, seed)
        progress()
        rank = (found.perplexity <= MOST_PERPLEXITY * plain.perplexity, found.share)
        if best is None or rank > best_rank:
            best = Steering(tone.name, layer, record.strength, vector.norm()), dose
            best_rank = rank
    assert best is not None
    return best


@contextmanager
def _one_thread() -> Iterator[None]:
    """The model's products are so small that threads only wait for each other, on a busy machine for seconds."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)
