"""Texts that a model writes under many settings at once, and what they show by themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..decode.request import Steer, TextRequest
from ..decode.run import decode
from ..generate import Generating
from ..models.adapter import ModelAdapter
from ..pack import Pair
from ..sampling import Options
from ..score_pairs import score_pairs
from ..text import Prompt
from .dose import Edited

__all__ = ["Written", "costs_of", "mean_logprobs", "repetition", "write"]

ROWS, ROWS_GPU = 64, 512
GRAM = 4


@dataclass(frozen=True)
class Written:
    """One answer.

    Args:
        prompt: token ids of what was asked.
        ids: token ids of the answer, without what ended it.
        text: the answer.
    """

    prompt: tuple[int, ...]
    ids: tuple[int, ...]
    text: str

    @property
    def repetition(self) -> float:
        """Share of its runs of four tokens that it has written before."""
        return repetition(self.ids)

    @property
    def pair(self) -> Pair | None:
        """(prompt ids, answer ids); None where it wrote nothing."""
        return (self.prompt, self.ids) if self.ids else None


def write(
    adapter: ModelAdapter,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    settings: Sequence[Edited],
    options: Options,
) -> list[list[Written]]:
    """Answers to every prompt under every setting, decoded together; each setting draws with the same seeds.

    Args:
        adapter: the model.
        tokenizer: its tokenizer.
        prompts: text, token ids or chat messages.
        settings: of interventions that name no rows and no mask.
        options: how answers are drawn, and how long they may be; its vector isn't looked at.

    Returns:
        By setting, in the order of the prompts.

    Raises:
        ValidationError: a prompt that is empty or fills the model's context.
    """
    made = _Writing(adapter, tokenizer, list(prompts) * len(settings), replace(options, vector=None))
    made.begin([setting for setting in settings for _ in prompts], len(prompts))
    rows = made.rows(stream=False)
    room = ROWS if adapter.device.type == "cpu" else ROWS_GPU
    for first in range(0, len(rows), room):
        decode(adapter, rows[first : first + room], made.padding)
    ends = set(made.ends)
    found = []
    for ids, row in zip(made.ids, rows, strict=True):
        chosen = list(row.chosen)
        while chosen and chosen[-1] in ends:
            chosen.pop()
        found.append(Written(tuple(ids), tuple(chosen), row.text))
    n = len(prompts)
    return [found[first : first + n] for first in range(0, len(found), n)]


class _Writing(Generating):
    """Rows of which each is steered its own way, and seeded by its prompt."""

    def begin(self, settings: Sequence[Edited], n_prompts: int) -> None:
        self._settings = [
            tuple(
                Steer(self.adapter.layer_index(i.layer), i.edit, i.tokens, i.varying, i.condition)
                for i in one
            )
            for one in settings
        ]
        self.seeds = self.seeds[:n_prompts] * (len(settings) // n_prompts)

    def request(self, i: int, request: TextRequest) -> TextRequest:
        return replace(request, steering=self._settings[i])


def repetition(ids: Sequence[int]) -> float:
    """Share of a text's runs of four tokens that came before in it; 0 for a text that has at most one."""
    runs = [tuple(ids[i : i + GRAM]) for i in range(len(ids) - GRAM + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def mean_logprobs(adapter: ModelAdapter, answers: Sequence[Written]) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each answer its log-probability under the model as it is, and its number of tokens, [n] float64 each."""
    pairs = [one.pair for one in answers]
    sums, counts = torch.zeros(2, len(pairs), dtype=torch.float64)
    at = [i for i, pair in enumerate(pairs) if pair is not None]
    if at:
        found = score_pairs(adapter, [pair for pair in pairs if pair is not None])
        sums[at] = found.sums.double().cpu()
        counts[at] = torch.tensor([len(ids) for ids in found.token_ids], dtype=torch.float64)
    return sums, counts


def costs_of(
    adapter: ModelAdapter, written: Sequence[Sequence[Written]]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What ``mean_logprobs`` gives for each setting's answers, all scored together: each prompt is read once."""
    sums, counts = mean_logprobs(adapter, [one for answers in written for one in answers])
    sizes = [len(answers) for answers in written]
    return list(zip(torch.split(sums, sizes), torch.split(counts, sizes), strict=True))
