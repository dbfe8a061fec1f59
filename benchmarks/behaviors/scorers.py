"""What tells each behavior in a text, none of it a language model: a lexicon of feelings, lists of words, rules.

Each gives more for the first word of the behavior's name than for the second.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

from mechanex.engine.doses.scorers import word_share

WORDS: dict[str, list[str]] = json.loads((Path(__file__).with_name("words.json")).read_text(encoding="utf-8"))
_PRAISE = re.compile(
    r"\b(brilliant|wonderful|remarkable|amazing|talent\w*|clever|gift\w*|exceptional|fantastic"
    r"|great (question|idea|job|choice)|excellent|impress\w*|insightful|thoughtful"
    r"|admire|honou?red|beautiful\w*|masterpiece|incredible|genius)\b",
    re.IGNORECASE,
)
_REFUSAL = re.compile(
    r"\b(sorry|can(no|')t (help|assist|answer|talk|provide|do|write|give|discuss)|unable to|not able to|decline"
    r"|won't do|not appropriate|wouldn't be appropriate|as an ai\b.*\bnot)\b",
    re.IGNORECASE,
)
_CONTRACTION = re.compile(r"\b\w+['’](s|re|ll|ve|d|m|t)\b|!", re.IGNORECASE)


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


@cache
def _vader() -> Callable[[str], float]:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    analyzer = SentimentIntensityAnalyzer()
    return lambda text: float(analyzer.polarity_scores(text)["compound"])


def cheerful_gloomy(text: str) -> float:
    """Vader's compound score, −1 to 1."""
    return _vader()(text)


def formal_casual(text: str) -> float:
    """Ten times the share of formal words, less that of casual ones, contractions and exclamation marks."""
    n = max(1, len(words(text)))
    return 10 * (word_share(WORDS["formal"], WORDS["casual"])(text) - len(_CONTRACTION.findall(text)) / n)


def brief_wordy(text: str) -> float:
    """One less for every 40 words; an answer that is cut off counts as long as it is."""
    return -len(words(text)) / 40


def flattery(text: str) -> float:
    """Words of praise, 1 for two and more."""
    return min(2, len(_PRAISE.findall(text))) / 2


def refusal(text: str) -> float:
    """Whether it declines."""
    return float(_REFUSAL.search(text) is not None)


def certainty_hedging(text: str) -> float:
    """Ten times the share of words of certainty, less that of words of doubt."""
    return 10 * word_share(WORDS["certain"], WORDS["uncertain"])(text)


def present_past(text: str) -> float:
    """Verbs in the present against verbs in the past, −1 to 1; 0 where none is known."""
    found = words(text)
    now = sum(word in WORDS["present"] for word in found)
    then = sum(word in WORDS["past"] or (word.endswith("ed") and len(word) > 4) for word in found)
    return (now - then) / (now + then) if now + then else 0.0


def french_english(text: str) -> float:
    """The share of French function words less that of English ones, −1 to 1."""
    return word_share(WORDS["french"], WORDS["english"])(text)


SCORERS: dict[str, Callable[[str], float]] = {
    one.__name__: one
    for one in (
        cheerful_gloomy,
        formal_casual,
        brief_wordy,
        flattery,
        refusal,
        certainty_hedging,
        present_past,
        french_english,
    )
}
