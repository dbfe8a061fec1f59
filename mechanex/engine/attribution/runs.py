"""A clean and a corrupted run of a model: their activations, their logits and the metric."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...errors import ValidationError
from ..limits import check_length
from ..models.adapter import Handles, ModelAdapter, exclusive, undisturbed
from ..sharded import check_whole
from .metrics import Answer, Metric, check_metric, first_token, metric_of
from .prompts import PromptPair
from .sites import Site, last_logits, tapped

__all__ = ["Recording", "Runs", "alone", "ids_of", "recorded", "run_pair"]


@contextmanager
def alone(adapter: ModelAdapter) -> Iterator[None]:
    """Runs a block alone on a model, in eval mode, without gradients of weights; then all is put back."""
    with exclusive(adapter), undisturbed(adapter.hf_model), torch.inference_mode(False), torch.enable_grad():
        yield


@dataclass(eq=False)
class Recording:
    """What a pass over one prompt showed.

    Attributes:
        logits: [n_vocab] float32 at the prompt's end.
        values: for each site its activations [T, width], without gradient.
        live: where gradients were asked for, for each site its activations [1, T, …] as the logits hang on them.
    """

    logits: Tensor
    values: dict[Site, Tensor]
    live: dict[Site, Tensor]


def recorded(
    adapter: ModelAdapter, ids: Sequence[int], sites: Sequence[Site], gradients_from: Site | None = None
) -> Recording:
    """Runs a prompt once.

    Args:
        adapter: the model.
        ids: the prompt.
        sites: what is recorded.
        gradients_from: where gradients begin; None for a pass without any.

    Raises:
        ValidationError: a site that the prompt's pass doesn't come to.
    """
    values: dict[Site, Tensor] = {}
    live: dict[Site, Tensor] = {}

    def note(site: Site) -> Callable[[Tensor], Tensor | None]:
        def keep(value: Tensor) -> Tensor | None:
            if site is gradients_from:
                value = value.detach().clone().requires_grad_(True)
            # Copies: the model may go on in the same memory.
            values[site] = value.detach()[0].flatten(1).clone()
            if gradients_from is None:
                return None
            live[site] = value
            return value.clone()

        return keep

    with torch.set_grad_enabled(gradients_from is not None), Handles() as handles:
        for site in sites:
            handles.add(tapped(site, 1, len(ids), note(site)))
        logits = last_logits(adapter, ids_of(adapter, ids))
    idle = next((site.path for site in sites if site not in values), None)
    if idle is not None:
        raise ValidationError(
            f"{idle} took no part in the pass over one of the prompts, so it has nothing to patch: leave it out of "
            "target_module_paths."
        )
    return Recording(logits[0], values, live)


@dataclass(eq=False)
class Runs:
    """Both runs.

    Attributes:
        pair: the prompts.
        clean, corrupted: what each showed.
        metric: what is attributed.
        clean_metric, corrupted_metric: its values.
    """

    pair: PromptPair
    clean: Recording
    corrupted: Recording
    metric: Metric
    clean_metric: float = field(init=False)
    corrupted_metric: float = field(init=False)

    def __post_init__(self) -> None:
        both = torch.stack([self.clean.logits, self.corrupted.logits.detach()])
        found = check_metric(self.metric(both), 2)
        self.clean_metric, self.corrupted_metric = found.tolist()
        if not torch.isfinite(found).all():
            raise ValidationError(
                f"the metric is {self.clean_metric} for the clean prompt and {self.corrupted_metric} for the corrupted "
                "one: it must be finite for both."
            )

    def delta(self, site: Site) -> Tensor:
        """[T corrupted, width] float32, clean minus corrupted activations."""
        return self.pair.delta(self.clean.values[site], self.corrupted.values[site])

    def forget(self) -> None:
        """Drops the activations."""
        for recording in (self.clean, self.corrupted):
            recording.values, recording.live = {}, {}
            recording.logits = recording.logits.detach()


def ids_of(adapter: ModelAdapter, ids: Sequence[int], rows: int = 1) -> Tensor:
    """[rows, T] token ids on the model's device."""
    return torch.tensor([list(ids)] * rows, device=adapter.device)


def run_pair(
    adapter: ModelAdapter,
    tokenizer: Any,
    pair: PromptPair,
    sites: Sequence[Site],
    metric: Metric | Sequence[Answer] | None,
    gradients_from: Site | None = None,
) -> Runs:
    """Runs both prompts, the corrupted one with gradients where it is said from where.

    Raises:
        ValidationError: prompts that are too long, or what ``metric_of`` refuses.
    """
    check_whole(adapter.hf_model, "Attribution looks inside of modules, which isn't possible")
    check_length(adapter, max(len(pair.clean), len(pair.corrupted)))
    clean = recorded(adapter, pair.clean, sites)
    corrupted = recorded(adapter, pair.corrupted, sites, gradients_from)
    chosen = metric_of(
        metric,
        clean.logits,
        corrupted.logits,
        lambda answer: first_token(adapter, tokenizer, pair.clean, answer),
    )
    return Runs(pair, clean, corrupted, chosen)
