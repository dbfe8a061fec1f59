"""From log-probabilities of tokens to losses of completions, and what of these losses is minimised.

A step minimises some function of the completions' losses. Only its derivative by each loss is needed, since the rest is
the chain rule: so an objective is a function from losses to weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...ops.logprob import log1mexp, log_add_eps
from ..pack import Pack
from .datapoints import Completion
from .settings import LossOptions

__all__ = ["Objective", "TokenOrder", "completion_losses", "counted", "plain_sum", "satisficing"]

Objective = Callable[[Tensor, Tensor], Tensor]
"""From losses [P] and the completions [P] int64 that they are of, the derivative [P] of what is minimised."""


@dataclass(frozen=True)
class TokenOrder:
    """Which of a pack's scored tokens belong to which completion.

    Attributes:
        completions: [P] int64, the pack's completions in order.
        dst, src: indices of the tokens of completions to promote and to suppress.
        owner: [N] int64, place in ``completions`` of each token, dst tokens first.
        share: [N] 1/(tokens of the completion), in that order.
    """

    completions: Tensor
    dst: Tensor
    src: Tensor
    owner: Tensor
    share: Tensor

    @classmethod
    def of(cls, pack: Pack, completions: Sequence[Completion], dtype: torch.dtype) -> TokenOrder:
        """The order of a pack's tokens; ``completions`` are the pairs that it was built of."""
        pair = pack.pair.tolist()
        present = sorted(set(pair))
        place = {i: p for p, i in enumerate(present)}
        sides: tuple[list[int], list[int]] = ([], [])
        for n, i in enumerate(pair):
            sides[completions[i].side == "src"].append(n)
        order = [pair[n] for side in sides for n in side]

        def tensor(values: Sequence[float], kind: torch.dtype = torch.int64) -> Tensor:
            return torch.tensor(values, dtype=kind, device=pack.pair.device)

        return cls(
            tensor(present),
            tensor(sides[0]),
            tensor(sides[1]),
            tensor([place[i] for i in order]),
            tensor([1 / len(completions[i].ids) for i in order], dtype),
        )


def completion_losses(logprobs: Tensor, order: TokenOrder, options: LossOptions) -> Tensor:
    """[..., P] losses of completions from [..., N] log-probabilities of their tokens.

    To promote (dst): −Σ log(p + eps). To suppress (src): −Σ log(1 − p + eps) with ``do_one_minus``, else +Σ log(p +
    eps). With ``normalize``, divided by the number of tokens.
    """
    # Each side's tokens are taken out first: an unused branch of a where() would turn infinite slopes into NaN.
    parts = []
    if order.dst.numel():
        parts.append(-log_add_eps(logprobs.index_select(-1, order.dst), options.eps))
    if order.src.numel():
        src = logprobs.index_select(-1, order.src)
        if options.do_one_minus:
            parts.append(-log_add_eps(log1mexp(src), options.eps))
        else:
            parts.append(log_add_eps(src, options.eps))
    tokens = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
    if options.normalize:
        tokens = tokens * order.share
    zero = tokens.new_zeros(*tokens.shape[:-1], order.completions.numel())
    return zero.index_add(-1, order.owner, tokens)


def plain_sum(losses: Tensor, completions: Tensor) -> Tensor:
    """Minimises the sum of the losses."""
    return torch.ones_like(losses)


def satisficing(targets: Tensor) -> Objective:
    """Minimises Σ (loss − target)², with a target [n] for every completion."""

    def derivative(losses: Tensor, completions: Tensor) -> Tensor:
        return 2 * (losses - targets[completions])

    return derivative


def counted(objective: Objective, counts: Tensor) -> Objective:
    """The same objective with every completion counted [n] times."""

    def derivative(losses: Tensor, completions: Tensor) -> Tensor:
        return objective(losses, completions) * counts[completions]

    return derivative
