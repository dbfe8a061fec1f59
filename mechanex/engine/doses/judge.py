"""Texts under doses on one set of prompts: what a scorer says of them, and their perplexity under the plain model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm.auto import tqdm

from ..given import as_list
from ..models.adapter import ModelAdapter
from ..sampling import Options
from ..text import Prompt
from ..vectors import SteeringVector
from .dose import Dose
from .intervals import Interval, mean_of, ratio_of
from .kept_work import KeptWork
from .scorers import TextScorer
from .swept import Texts
from .written import ROWS, Written, costs_of, write

__all__ = ["TextJudge", "name_of"]


def name_of(dose: Dose) -> str:
    """A dose's name among results that are kept."""
    return f"{dose.method}: {dose.layer}+{dose.width} {dose.edit} {dose.tokens} {dose.strength!r}"


class TextJudge:
    """Texts on the validation prompts, what the scorer says of them and what they cost, each dose once.

    Attributes:
        work: tokens times layers of everything so far.
        whole: tokens times layers of the texts of one setting and their perplexity.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        tokenizer: Any,
        prompts: Sequence[Prompt],
        scorer: TextScorer,
        options: Options,
        vectors: Mapping[str, SteeringVector],
        kept: KeptWork,
        progress: bool,
    ) -> None:
        self._adapter, self._tokenizer = adapter, tokenizer
        self._prompts: list[Prompt] = as_list("validation", prompts, "prompts")
        self._scorer, self._options, self._vectors, self._kept = scorer, options, vectors, kept
        self.progress = progress
        self.work = self.whole = 0.0
        self.plain_score = self.plain_perplexity = 0.0

    def plain(self) -> Texts:
        """The plain model's own texts."""
        score, logprob, n_tokens, repetition, self.whole = self._known(["plain"], [None])[0]
        self.plain_score = score
        self.plain_perplexity = _perplexity(logprob, n_tokens)
        return Texts(0.0, 1.0, repetition)

    def texts(self, doses: Sequence[Dose]) -> list[Texts]:
        """What each dose does to texts."""
        names = [name_of(dose) for dose in doses]
        return [
            Texts(score - self.plain_score, _perplexity(logprob, n) / self.plain_perplexity, repetition)
            for score, logprob, n, repetition, _ in self._known(names, list(doses))
        ]

    def confirm(self, dose: Dose, prompts: Sequence[Prompt]) -> dict[str, Interval]:
        """Effect and perplexity of a dose on other prompts, with intervals."""
        settings = [(), dose.of(self._vectors[dose.method])]
        written = write(self._adapter, self._tokenizer, prompts, settings, self._options)
        self.work += sum(map(self._work, written))
        scores = [[self._scorer(one.text) for one in texts] for texts in written]
        costs = costs_of(self._adapter, written)
        plain = _perplexity(float(costs[0][0].sum()), float(costs[0][1].sum()))
        return {
            "plain": mean_of(scores[0]),
            "effect": mean_of([after - before for before, after in zip(*scores, strict=True)]),
            "perplexity": ratio_of(
                costs[1][0].tolist(), costs[1][1].tolist(), lambda mean: math.exp(min(-mean, 700)) / plain
            ),
        }

    def _known(self, names: list[str], doses: Sequence[Dose | None]) -> list[list[float]]:
        """Of each dose (None: plain) mean score, summed log-probability, tokens, repetition, work."""
        known = self._kept.written()
        todo = {
            name: () if dose is None else dose.of(self._vectors[dose.method])
            for name, dose in zip(names, doses, strict=True)
            if name not in known
        }
        names_left = list(todo)
        step = max(1, ROWS // len(self._prompts))
        parts = [names_left[i : i + step] for i in range(0, len(names_left), step)]
        for part in tqdm(parts, desc="Texts", disable=not self.progress or len(parts) < 2):
            written = write(
                self._adapter, self._tokenizer, self._prompts, [todo[name] for name in part], self._options
            )
            costs = costs_of(self._adapter, written)
            for name, texts, (logprob, n_tokens) in zip(part, written, costs, strict=True):
                known[name] = [
                    sum(self._scorer(one.text) for one in texts) / len(texts),
                    float(logprob.sum()),
                    float(n_tokens.sum()),
                    sum(one.repetition for one in texts) / len(texts),
                    self._work(texts),
                ]
                self.work += self._work(texts)
            self._kept.save()
        return [known[name] for name in names]

    def _work(self, texts: Sequence[Written]) -> float:
        return 2.0 * self._adapter.n_layers * sum(len(one.prompt) + len(one.ids) for one in texts)


def _perplexity(logprob: float, n_tokens: float) -> float:
    return math.exp(min(-logprob / n_tokens, 700)) if n_tokens else math.inf
