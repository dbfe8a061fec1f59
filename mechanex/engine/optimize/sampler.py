"""Which prompts each step sees, and when an epoch is over."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from .datapoints import Completion
from .noise import SHUFFLE, seeded

__all__ = ["Epoch", "Minibatches"]


@dataclass(frozen=True)
class Epoch:
    """An epoch that isn't over yet: its number, and the losses so far, by completion."""

    number: int = 0
    losses: dict[int, float] = field(default_factory=dict)


class Minibatches:
    """Prompts in minibatches of one size, which may be any.

    The first epoch has the given order, later ones a random one of their own; a minibatch that an epoch doesn't fill
    goes on with the next epoch's prompts.

    Args:
        completions: of all prompts; a prompt is a datapoint.
        size: prompts of a minibatch.
        seed: of the orders.
    """

    def __init__(self, completions: Sequence[Completion], size: int, seed: int) -> None:
        self._size, self._seed, self._n_completions = size, seed, len(completions)
        self._completions: dict[int, list[int]] = {}
        for i, completion in enumerate(completions):
            self._completions.setdefault(completion.datapoint, []).append(i)
        self._n = len(self._completions)
        self._orders: dict[int, list[int]] = {}

    def prompts(self, step: int) -> list[tuple[int, int]]:
        """(epoch, prompt) for every place of a step's minibatch."""
        places = range(step * self._size, (step + 1) * self._size)
        return [(place // self._n, self._order(place // self._n)[place % self._n]) for place in places]

    def counts(self, step: int) -> dict[int, int]:
        """How often each completion of a step's minibatch is in it."""
        prompts = Counter(prompt for _, prompt in self.prompts(step))
        return {i: count for prompt, count in prompts.items() for i in self._completions[prompt]}

    def collect(self, epoch: Epoch, step: int, losses: Sequence[float]) -> tuple[list[float] | None, Epoch]:
        """The losses of the epoch that this step completes, or None, and the epoch that goes on.

        Where a step completes several, it is the last of them.

        Args:
            epoch: before the step.
            step: counted from 0.
            losses: of all completions; those of the step's minibatch are looked at.
        """
        done, number, seen = None, epoch.number, dict(epoch.losses)
        for which, prompt in self.prompts(step):
            if which != number:
                number, seen = which, {}
            seen.update((i, losses[i]) for i in self._completions[prompt])
            if len(seen) == self._n_completions:
                done = [seen[i] for i in range(self._n_completions)]
        return done, Epoch(number, seen)

    def _order(self, epoch: int) -> list[int]:
        if epoch not in self._orders:
            for old in [e for e in self._orders if e < epoch - 1]:
                del self._orders[old]
            order = list(range(self._n))
            if epoch:
                order = torch.randperm(self._n, generator=seeded(self._seed, SHUFFLE, epoch)).tolist()
            self._orders[epoch] = order
        return self._orders[epoch]
