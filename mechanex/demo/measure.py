"""How a tone is steered, completions of prompts at one strength, and the figures that describe them."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from ..bundled import tone_words
from ..engine.generate import generate_batch
from ..engine.models.resolve import LoadedModel
from ..engine.score import completion_logprobs
from ..engine.vectors import SteeringVector

__all__ = ["MAX_TOKENS", "Measurement", "Steering", "count_words", "measure", "tone_of"]

MAX_TOKENS = 40


@dataclass(frozen=True)
class Steering:
    """How a tone is steered, as chosen on the train split.

    Args:
        tone: the tone's name.
        layer: the layer that is steered.
        unit: how many mean-difference vectors strength 1 adds, the calibrated dose.
        norm: Euclidean norm of one mean-difference vector.
    """

    tone: str
    layer: int
    unit: float
    norm: float


@dataclass(frozen=True)
class Measurement:
    """Completions at one strength.

    Args:
        tone: the tone that is steered towards.
        strength: how many times the vector is added.
        share: share of completions in which the tone's words outnumber those of every other tone, 0 to 1.
        words: the tone's words per 100 words.
        perplexity: of the completions under the unsteered model, per token.
        completions: what was written, one per prompt.
        perplexities: of each of them.
    """

    tone: str
    strength: float
    share: float
    words: float
    perplexity: float
    completions: tuple[str, ...]
    perplexities: tuple[float, ...]


def measure(
    loaded: LoadedModel, tone: str, prompts: Sequence[str], vector: SteeringVector, strength: float, seed: int
) -> Measurement:
    """Samples one completion of each prompt, steered by ``strength * vector``."""
    steering: dict[str, Any] = {"vector": vector, "strength": strength} if strength else {}
    texts = generate_batch(
        loaded.model,
        loaded.tokenizer,
        prompts,
        max_tokens=MAX_TOKENS,
        seed=seed,
        **steering,
    )
    completions = [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]
    logprobs = _logprobs(loaded, prompts, completions)
    n_words = sum(len(_words(completion)) for completion in completions)
    of_tone = sum(count_words(completion, tone) for completion in completions)
    return Measurement(
        tone=tone,
        strength=strength,
        share=sum(tone_of(completion) == tone for completion in completions) / len(completions),
        words=100 * of_tone / max(n_words, 1),
        perplexity=_perplexity([one for each in logprobs for one in each]),
        completions=tuple(completion.strip() for completion in completions),
        perplexities=tuple(map(_perplexity, logprobs)),
    )


def tone_of(text: str) -> str:
    """The tone whose words are the most in a text, ``"neutral"`` where none are or two tones have as many."""
    counts = Counter(tone for word in _words(text) if (tone := _tone_by_word().get(word)) is not None)
    ranked = counts.most_common(2)
    if not ranked or (len(ranked) == 2 and ranked[0][1] == ranked[1][1]):
        return "neutral"
    return ranked[0][0]


def count_words(text: str, tone: str) -> int:
    """How many words of the tone are in a text."""
    return sum(_tone_by_word().get(word) == tone for word in _words(text))


def _logprobs(loaded: LoadedModel, prompts: Sequence[str], completions: Sequence[str]) -> list[list[float]]:
    """Log-probabilities [nats] of every completion's tokens under the unsteered model."""
    written = [i for i, completion in enumerate(completions) if completion.strip()]
    found: list[list[float]] = [[] for _ in completions]
    if written:
        asked, answers = [prompts[i] for i in written], [completions[i] for i in written]
        scored = completion_logprobs(loaded.model, asked, answers, loaded.tokenizer)
        for i, logprobs in zip(written, scored.tokens, strict=True):
            found[i] = logprobs.tolist()
    return found


def _perplexity(logprobs: Sequence[float]) -> float:
    return math.exp(-math.fsum(logprobs) / len(logprobs)) if logprobs else math.nan


@cache
def _tone_by_word() -> dict[str, str]:
    return {word: tone for tone, words in tone_words().items() for word in words}


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())
