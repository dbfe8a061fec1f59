"""What was seen in the tokens of answers, for whole answers and for the events of streamed ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ...engine.sae.watching import Watch
from ...engine.token_texts import TokenTexts
from ..model.requests import Result, Step, TracedToken, trace_of, traced

__all__ = ["Scores"]


class Scores:
    """The field ``behaviors`` of each choice: ``{"detected": names so far, "tokens": [scores of each token]}``.

    Args:
        texts: single tokens as text.
        onlookers: one per answer, or None where nothing is watched.
    """

    def __init__(self, texts: TokenTexts, onlookers: Sequence[object]) -> None:
        self._texts = texts
        self._watches = [one if isinstance(one, Watch) else None for one in onlookers]
        self._tokens: list[list[int]] = [[] for _ in onlookers]
        self._n_told = [0] * len(onlookers)

    def whole(self, index: int, result: Result) -> dict[str, Any]:
        """Of a finished answer."""
        return self._field(index, trace_of(result, self._named(result.tokens), self._watches[index]))

    def take(self, index: int, news: Step | Result) -> None:
        """Takes what a stream has to tell next."""
        if isinstance(news, Step):
            self._tokens[index] += news.tokens
        else:
            self._tokens[index] = list(news.tokens)

    def part(self, index: int, ended: bool) -> dict[str, Any]:
        """Of the tokens that a stream has not told yet; of one that goes on, those that were scored to the end."""
        watch, tokens, begin = self._watches[index], self._tokens[index], self._n_told[index]
        seen = [] if watch is None else watch.seen[begin:]
        # The model may be about to add to the latest one.
        end = len(tokens) if ended or watch is None else min(len(tokens), begin + max(len(seen) - 1, 0))
        self._n_told[index] = max(begin, end)
        new = tokens[begin:end]
        return self._field(index, traced(new, self._named(new), seen))

    def _named(self, tokens: Sequence[int]) -> list[str]:
        return [self._texts[token][0] for token in tokens]

    def _field(self, index: int, tokens: Sequence[TracedToken]) -> dict[str, Any]:
        watch = self._watches[index]
        return {
            "detected": [] if watch is None else list(watch.detected),
            "tokens": [
                {
                    "token": one.text,
                    "scores": {
                        name: score if math.isfinite(score) else None for name, score in one.scores.items()
                    },
                    "detected": list(one.detected),
                    "corrected": list(one.corrected),
                }
                for one in tokens
            ],
        }
