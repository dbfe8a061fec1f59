"""Judges of a text that are no language model: lists of words, and naive Bayes on contrastive examples."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy

from ...errors import ValidationError
from ..given import as_finite, as_list

__all__ = ["Scores", "TextScorer", "as_scorers", "classifier", "numbered", "word_share"]

TextScorer = Callable[[str], float]
"""From an answer to how much it shows of what is sought."""

Scores = TextScorer | Mapping[str, TextScorer] | Sequence[TextScorer]

_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)?")


def as_scorers(scorers: Scores) -> dict[str, TextScorer]:
    """Scorers by name, each of which refuses to give anything but numbers.

    Raises:
        ValidationError: none, or something that can't be called.
    """
    if isinstance(scorers, Mapping):
        found = {str(name): one for name, one in scorers.items()}
    else:
        listed = as_list("scorers", [scorers] if callable(scorers) else scorers, "scorers")
        found = {getattr(one, "__name__", f"scorer {i + 1}"): one for i, one in enumerate(listed)}
        if len(found) < len(listed):
            raise ValidationError("two scorers have one name: give them as {name: scorer}.")
    if not found:
        raise ValidationError("There are no scorers: give a function from a text to a number.")
    return {name: numbered(name, one) for name, one in found.items()}


def numbered(name: str, scorer: TextScorer) -> TextScorer:
    """A scorer that gives finite numbers, or says so.

    Args:
        name: what it is called in messages.
        scorer: from a text to a number.

    Raises:
        ValidationError: it can't be called.
    """
    if not callable(scorer):
        raise ValidationError(f"{name} is a function from a text to a number; got {scorer!r:.100}.")

    def score(text: str) -> float:
        given = scorer(text)
        number = as_finite(int(given) if isinstance(given, (bool, numpy.bool_)) else given)
        if number is None:
            raise ValidationError(f"{name} gave {given!r:.100} for a text: a scorer gives a finite number.")
        return number

    return score


def words_of(text: str) -> list[str]:
    """The words of a text in small letters."""
    return _WORD.findall(text.lower())


def word_share(words: Iterable[str], against: Iterable[str] = ()) -> TextScorer:
    """A scorer: the share of a text's words that are on a list, less the share that is on another.

    Args:
        words: of what is sought; one that ends with ``*`` is the beginning of a word.
        against: of its opposite.

    Raises:
        ValidationError: no words, or one text where a list is meant.
    """
    words = as_list("words", words, "words")
    against = as_list("against", against, "words") if against else ()
    sought, opposed = _matcher(words), _matcher(against)

    def share(text: str) -> float:
        found = words_of(text)
        return sum(sought(word) - opposed(word) for word in found) / len(found) if found else 0.0

    return share


def _matcher(words: Iterable[str]) -> Callable[[str], bool]:
    listed = {word.lower() for word in words}
    whole = {word for word in listed if not word.endswith("*")}
    begins = tuple(word[:-1] for word in listed - whole)
    return lambda word: word in whole or (bool(begins) and word.startswith(begins))


def classifier(positive: Sequence[str], negative: Sequence[str]) -> TextScorer:
    """A scorer: the probability, by naive Bayes over words with add-one smoothing, that a text is of the first kind.

    A text's evidence counts by the square root of its length, so that long texts aren't always certain.

    Args:
        positive, negative: texts of both kinds, at least one each.

    Raises:
        ValidationError: a kind without texts.
    """
    if not positive or not negative:
        raise ValidationError("a classifier is made from texts of both kinds; one of them has none.")
    counts = [Counter(word for text in texts for word in words_of(text)) for texts in (positive, negative)]
    vocabulary = counts[0].keys() | counts[1].keys()
    totals = [sum(one.values()) + len(vocabulary) for one in counts]
    odds = {
        word: math.log((counts[0][word] + 1) / totals[0]) - math.log((counts[1][word] + 1) / totals[1])
        for word in vocabulary
    }

    def probability(text: str) -> float:
        found = [odds[word] for word in words_of(text) if word in odds]
        evidence = sum(found) / math.sqrt(len(found)) if found else 0.0
        return 1 / (1 + math.exp(-max(-50.0, min(50.0, evidence))))

    return probability
