"""Two judges of a text's tone: a list of words and a naive Bayes classifier, which knows texts of another seed.

python benchmarks/tones.py
"""

from __future__ import annotations

import json
import random
import re
import sys
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from tiny import grammar  # noqa: E402
from tiny.lexicon import TONES  # noqa: E402

# The model's corpus is of seed 0, its held-out texts of 1,000,003.
TRAIN_SEED, TEST_SEED = 77, 78


def words_of(text: str) -> list[str]:
    """Returns the lower-case words of a text."""
    return re.findall(r"[a-z]+", text.lower())


@cache
def _word_tones() -> dict[str, str]:
    path = ROOT / "mechanex" / "bundled" / "data" / "tone_words.json"
    return {word: tone for tone, words in json.loads(path.read_text()).items() for word in words}


def by_words(text: str) -> str:
    """Returns the tone with most words of the list in the text, "neutral" if there is none or a draw."""
    counts = Counter(_word_tones()[word] for word in words_of(text) if word in _word_tones())
    best = counts.most_common(2)
    if not best or (len(best) == 2 and best[0][1] == best[1][1]):
        return "neutral"
    return best[0][0]


class NaiveBayes:
    """Multinomial naive Bayes over the words of a text, with add-one smoothing."""

    def __init__(self, texts: Sequence[str], labels: Sequence[str]) -> None:
        self.labels = sorted(set(labels))
        self.vocabulary = {word: i for i, word in enumerate(sorted({w for t in texts for w in words_of(t)}))}
        counts = np.ones((len(self.labels), len(self.vocabulary)))
        for text, label in zip(texts, labels, strict=True):
            for word in words_of(text):
                counts[self.labels.index(label), self.vocabulary[word]] += 1
        prior = np.array([labels.count(label) for label in self.labels]) / len(labels)
        self.log_prior = np.log(prior)
        self.log_likelihood = np.log(counts / counts.sum(1, keepdims=True))

    def __call__(self, text: str) -> str:
        """Returns the most probable label of a text."""
        known = [self.vocabulary[word] for word in words_of(text) if word in self.vocabulary]
        return self.labels[int(np.argmax(self.log_prior + self.log_likelihood[:, known].sum(1)))]


def labelled(seed: int, n: int, max_words: int = 30) -> tuple[list[str], list[str]]:
    """Returns continuations of neutral openings, cut to what a completion holds, and their tones."""
    rng = random.Random(seed)
    labels = [rng.choice(TONES) for _ in range(n)]
    texts = [grammar.toned(rng, tone)[1] for tone in labels]
    return [" ".join(text.split()[:max_words]) for text in texts], labels


@cache
def classifier() -> NaiveBayes:
    """Returns the classifier, trained once per process."""
    return NaiveBayes(*labelled(TRAIN_SEED, 8_000))


def is_tone(text: str, tone: str) -> bool:
    """Returns whether both judges hear the tone in the text."""
    return by_words(text) == tone and classifier()(text) == tone


def accuracy(n: int = 2_000) -> dict[str, float]:
    """Returns the share of fresh texts whose tone each judge finds."""
    texts, labels = labelled(TEST_SEED, n)
    judges = {"words": by_words, "classifier": classifier()}
    found = {name: [judge(text) for text in texts] for name, judge in judges.items()}
    found["both"] = [a if a == b else "" for a, b in zip(found["words"], found["classifier"], strict=True)]
    return {name: sum(map(str.__eq__, guesses, labels)) / n for name, guesses in found.items()}


if __name__ == "__main__":
    for name, share in accuracy().items():
        print(f"{name:10s} {share:.3f} of {2_000} fresh texts of {len(TONES)} tones")
