"""Contrastive examples as activations of their answers' tokens, read once for everything that is made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import ValidationError
from ..forward import packs_for, scored_logprobs
from ..models.adapter import Handles, ModelAdapter, exclusive, undisturbed
from ..pack import Pack, Pair
from ..ranks import current_ranks, dealt
from ..text import Prompt, encode_pair
from .activations import read_point
from .corrections import Correction
from .hook_points import HookPoint, on_point

__all__ = ["Examples", "answer_logprobs", "read_examples"]


@dataclass(frozen=True, eq=False)
class Examples:
    """Activations of answers' tokens, on the CPU.

    Args:
        pairs: 2n (prompt ids, answer ids): n positive ones, then the n negative ones of the same prompts.
        x: [N, d] float32.
        answer: [N] which of the pairs each is of.
        n: examples.
    """

    pairs: list[Pair]
    x: Tensor
    answer: Tensor
    n: int

    @property
    def positive(self) -> Tensor:
        """[2n] bool."""
        return torch.arange(2 * self.n) < self.n

    def of(self, examples: Sequence[int]) -> Examples:
        """Some of the examples, both answers of each."""
        chosen = [*examples, *(i + self.n for i in examples)]
        place = torch.full((2 * self.n,), -1)
        place[torch.tensor(chosen)] = torch.arange(len(chosen))
        kept = place[self.answer] >= 0
        pairs = [self.pairs[i] for i in chosen]
        return Examples(pairs, self.x[kept], place[self.answer[kept]], len(examples))

    def by_answer(self, values: Tensor) -> list[Tensor]:
        """[N] values of the tokens, for each of the 2n answers."""
        return [values[self.answer == i] for i in range(2 * self.n)]


def read_examples(
    adapter: ModelAdapter,
    point: HookPoint,
    prompts: Sequence[Prompt],
    positive_answers: Sequence[str],
    negative_answers: Sequence[str],
    *,
    tokenizer: Any = None,
    batch_tokens: int | None = None,
    progress: bool = False,
) -> Examples:
    """Runs examples through a model and keeps the activations of their answers' tokens.

    Raises:
        ValidationError: lists that don't belong together, an empty answer, or activations that aren't finite.
    """
    tokenizer = tokenizer if tokenizer is not None else adapter.tokenizer
    sides = (positive_answers, negative_answers)
    pairs: list[Pair] = [
        encode_pair(tokenizer, prompt, answer)
        for side in sides
        for prompt, answer in zip(prompts, side, strict=True)
    ]
    found: list[tuple[Tensor, Tensor]] = []
    ranks = current_ranks(adapter)
    with exclusive(adapter), torch.no_grad(), undisturbed(adapter.hf_model), ranks.together():
        packs = packs_for(adapter, pairs, batch_tokens=batch_tokens, processes=ranks.sharing)
        for pack in dealt(packs, ranks, "Examples", progress=progress):
            found.append((read_point(adapter, pack, point).cpu(), pack.pair.cpu()))
    found = [one for theirs in ranks.gathered(found) for one in theirs]
    x, answer = (torch.cat(parts) for parts in zip(*found, strict=True))
    if ranks.sharing > 1:
        answer, order = answer.sort(stable=True)
        x = x[order]
    if not bool(torch.isfinite(x).all()):
        raise ValidationError(
            "the activations of the examples are not finite: check the model's dtype, and steering that is attached."
        )
    return Examples(pairs, x, answer, len(prompts))


def answer_logprobs(
    adapter: ModelAdapter,
    point: HookPoint,
    pairs: Sequence[Pair],
    correction: Correction | None,
    *,
    batch_tokens: int | None = None,
) -> Tensor:
    """[n] mean log-probability of each answer's tokens, all of them corrected as they are read."""
    sums = torch.zeros(len(pairs), dtype=torch.float64)
    counts = torch.tensor([len(answer) for _, answer in pairs], dtype=torch.float64)
    ranks = current_ranks(adapter)
    with exclusive(adapter), torch.no_grad(), undisturbed(adapter.hf_model), ranks.together():
        packs = packs_for(adapter, pairs, batch_tokens=batch_tokens, processes=ranks.sharing)
        for pack in dealt(packs, ranks, "Scoring"):

            def correct(hidden: Tensor, pack: Pack = pack) -> Tensor | None:
                if correction is None:
                    return None
                inside = _answers(pack).to(hidden.device).view(*hidden.shape[:2], *(1,) * (hidden.dim() - 2))
                return torch.where(inside, correction(hidden), hidden)

            with Handles() as handles:
                handles.add(on_point(adapter, point, correct))
                logprobs = scored_logprobs(adapter, pack).double().cpu()
            sums.index_add_(0, pack.pair.cpu(), logprobs)
    return ranks.total(sums) / counts


def _answers(pack: Pack) -> Tensor:
    """[B, T] bool: tokens of answers."""
    inside = torch.zeros_like(pack.input_ids, dtype=torch.bool)
    written = pack.column >= 0
    inside[pack.row[written], pack.column[written]] = True
    return inside
