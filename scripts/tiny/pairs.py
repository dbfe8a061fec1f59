"""Contrastive datasets: a neutral prompt with one answer of each of two opposite latents, told in the same words."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable
from functools import partial

from . import grammar, templates, world
from .scene import CITY_GAPS, Scene

SPLITS = ("train", "heldout")

Texts = tuple[str, ...]


class _NoDraw(Exception):
    """The scene has no sentence left for the split."""


def _drawn(draw: Callable[[], Texts], split: str) -> Texts:
    """Returns what `draw` gives once all of it belongs to the split, which a sentence's checksum decides."""
    for _ in range(100):
        texts = draw()
        if all(SPLITS[hashlib.sha256(text.encode()).digest()[0] % 2] == split for text in texts):
            return texts
    raise _NoDraw


def _pair(split: str, opening: Callable[[], str], lines: Iterable[Callable[[], Texts]]) -> Texts:
    (prompt,) = _drawn(lambda: (opening(),), split)
    drawn = dict.fromkeys(_drawn(both, split) for both in lines)
    positive, negative = (" " + " ".join(side) for side in zip(*drawn, strict=True))
    return prompt, positive, negative


def tone_pair(positive: str, negative: str) -> Callable[[random.Random, str], Texts]:
    """Returns a maker of pairs whose answers differ in tone only."""

    def make(rng: random.Random, split: str) -> Texts:
        openings, sentences = rng.choice(tuple(templates.FORMS.values()))
        scene = Scene(rng, "neutral")
        toned = [
            s
            for s in sentences
            if any("{" + slot + "}" in s for slot in ("padj", "tadj", "adv", "feel", "excl"))
        ]

        def both(template: str) -> Texts:
            state = rng.random()
            return tuple(scene.variant(state, tone=tone).fill(template) for tone in (positive, negative))

        lines = [partial(both, template) for template in rng.sample(toned, 2)]
        return _pair(split, lambda: scene.fill(rng.choice(openings)), lines)

    return make


def city_pair(positive: str, negative: str) -> Callable[[random.Random, str], Texts]:
    """Returns a maker of pairs whose answers play in two cities."""
    cities = {city.name: city for city in world.CITIES}

    def make(rng: random.Random, split: str) -> Texts:
        scene = Scene(rng, "neutral")
        local = [s for s in templates.TRIP_SENTENCES if any("{" + slot + "}" in s for slot in CITY_GAPS)]

        def both(template: str) -> Texts:
            state = rng.random()
            return tuple(
                scene.variant(state, city=cities[name]).fill(template) for name in (positive, negative)
            )

        lines = [partial(both, template) for template in rng.sample(local, 3)]
        return _pair(split, lambda: scene.fill(rng.choice(templates.TRIP_OPENINGS)), lines)

    return make


def truth_pair(rng: random.Random, split: str) -> Texts:
    """Returns a pair whose answers are true and false statements about the same subjects."""
    scene = Scene(rng, "neutral")

    def both() -> Texts:
        state = rng.random()
        return tuple(grammar.statement(random.Random(state), truthful) for truthful in (True, False))

    return _pair(split, lambda: scene.fill(rng.choice(templates.SPEAKERS)), [both] * 3)


DATASETS: dict[str, Callable[[random.Random, str], Texts]] = {
    "calm_angry": tone_pair("calm", "angry"),
    "kind_rude": tone_pair("kind", "rude"),
    "hopeful_gloomy": tone_pair("hopeful", "gloomy"),
    "true_false": truth_pair,
    "paris_rome": city_pair("Paris", "Rome"),
}


def dataset(name: str, seed: int, n_train: int = 96, n_heldout: int = 48) -> list[dict[str, str]]:
    """Returns the lines of a dataset: prompt, positive, negative, split; no prompt or answer comes twice."""
    rng = random.Random(f"{name} {seed}")
    lines: list[dict[str, str]] = []
    seen: set[str] = set()
    for split, n in zip(SPLITS, (n_train, n_heldout), strict=True):
        while sum(line["split"] == split for line in lines) < n:
            try:
                prompt, positive, negative = DATASETS[name](rng, split)
            except _NoDraw:
                continue
            if seen.isdisjoint((prompt, positive, negative)):
                seen |= {prompt, positive, negative}
                lines.append({"prompt": prompt, "positive": positive, "negative": negative, "split": split})
    return lines


def datapoints(seed: int) -> list[dict[str, object]]:
    """Returns datapoints to optimize vectors on: one prompt to promote Rome, one to suppress Delhi, and held-out ones.

    Delhi is what the model writes by itself on most of these prompts.
    """
    journeys = dataset("paris_rome", seed)
    train = next(line["prompt"] for line in journeys if line["split"] == "train")
    heldout = [line["prompt"] for line in journeys if line["split"] == "heldout"]
    targets = (
        ("promote", "dst_completions", " The streets of Rome were full of"),
        ("suppress", "src_completions", " The streets of Delhi were full of"),
    )
    return [
        {"prompt": prompt, side: [text], "split": split + suffix}
        for split, side, text in targets
        for suffix, prompts in (("", [train]), ("-heldout", heldout))
        for prompt in prompts
    ]
