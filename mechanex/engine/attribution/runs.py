"""A clean and a corrupted run of a model: their activations, their logits and the metric."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...errors import ValidationError
from ..limits import check_length
from ..models.adapter import Handles, ModelAdapter, exclusive, undisturbed
from .metrics import Answer, Metric, check_metric, first_token, metric_of
from .prompts import PromptPair
from .sites import Site, last_logits, tapped

__all__ = ["Runs", "alone", "ids_of", "recorded", "run_pair"]


@contextmanager
def alone(adapter: ModelAdapter) -> Iterator[None]:
    """Runs a block alone on a model, in eval mode, without gradients of weights; then all is put back."""
    with exclusive(adapter), undisturbed(adapter.hf_model), torch.inference_mode(False), torch.enable_grad():
        yield


@dataclass(eq=False)
class Runs:
    """Both runs.

    Attributes:
        pair: the prompts.
        clean, corrupted: for each site its activations [T, width], without gradient.
        clean_logits, corrupted_logits: [n_vocab] float32 at the prompts' ends.
        metric: what is attributed.
        clean_metric, corrupted_metric: its values.
    """

    pair: PromptPair
    clean: dict[Site, Tensor]
    corrupted: dict[Site, Tensor]
    clean_logits: Tensor
    corrupted_logits: Tensor
    metric: Metric
    clean_metric: float = field(init=False)
    corrupted_metric: float = field(init=False)

    def __post_init__(self) -> None:
        both = torch.stack([self.clean_logits, self.corrupted_logits])
        found = check_metric(self.metric(both), 2)
        self.clean_metric, self.corrupted_metric = found.tolist()
        if not torch.isfinite(found).all():
            raise ValidationError(
                f"the metric is {self.clean_metric} for the clean prompt and {self.corrupted_metric} for the corrupted "
                "one: it must be finite for both."
            )

    def delta(self, site: Site) -> Tensor:
        """[T corrupted, width] float32, clean minus corrupted activations."""
        return self.pair.delta(self.clean[site], self.corrupted[site])


def ids_of(adapter: ModelAdapter, ids: Sequence[int], rows: int = 1) -> Tensor:
    """[rows, T] token ids on the model's device."""
    return torch.tensor([list(ids)] * rows, device=adapter.device)


def recorded(
    adapter: ModelAdapter, ids: Sequence[int], sites: Sequence[Site]
) -> tuple[Tensor, dict[Site, Tensor]]:
    """[n_vocab] logits at a prompt's end, and activations [T, width] of sites, from one pass without gradients."""
    found: dict[Site, Tensor] = {}
    with torch.no_grad(), Handles() as handles:
        for site in sites:
            handles.add(tapped(site, 1, len(ids), _noted(found, site)))
        logits = last_logits(adapter, ids_of(adapter, ids))
    return logits[0], found


def _noted(found: dict[Site, Tensor], site: Site) -> Any:
    def note(value: Tensor) -> None:
        # A copy: the model may go on in the same memory.
        found[site] = value[0].flatten(1).clone()

    return note


def run_pair(
    adapter: ModelAdapter,
    tokenizer: Any,
    pair: PromptPair,
    sites: Sequence[Site],
    metric: Metric | Sequence[Answer] | None,
) -> Runs:
    """Runs both prompts without gradients.

    Raises:
        ValidationError: prompts that are too long, or what ``metric_of`` refuses.
    """
    check_length(adapter, max(len(pair.clean), len(pair.corrupted)))
    clean_logits, clean = recorded(adapter, pair.clean, sites)
    corrupted_logits, corrupted = recorded(adapter, pair.corrupted, sites)
    chosen = metric_of(
        metric, clean_logits, corrupted_logits, lambda one: first_token(adapter, tokenizer, pair.clean, one)
    )
    return Runs(pair, clean, corrupted, clean_logits, corrupted_logits, chosen)
