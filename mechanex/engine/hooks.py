"""Steering a model: many edits, at many layers, for some tokens or some rows of the batch, as one plan."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import ValidationError
from .intervention import Edit, EditTable
from .models import adapter_for
from .models.adapter import Handles, ModelAdapter, ResidualHook
from .positions import TokenSelector, current_positions, token_mask

__all__ = ["Handle", "Intervention", "SteeringPlan", "positions"]

Handle = Handles


@dataclass(frozen=True, eq=False)
class Intervention:
    """One edit at one layer, and where it applies.

    Args:
        layer: the block whose incoming residual stream is edited; negatives count from the end.
        edit: what is done.
        tokens: an int or slice of absolute positions in the sequence (negatives from the end of the
            prompt), None for
            every token. Counted from the first real token of a left-padded row, also under a cache.
        rows: indices of the batch rows that are edited, None for all.
        mask: [B, T] bool for exactly one shape of call, instead of ``tokens`` and ``rows``.
    """

    layer: int
    edit: Edit
    tokens: TokenSelector = None
    rows: Sequence[int] | None = None
    mask: Tensor | None = None

    def __post_init__(self) -> None:
        if self.mask is not None and (self.tokens is not None or self.rows is not None):
            raise ValidationError("An intervention takes a mask, or tokens and rows; got both.")
        if self.rows is not None and any(isinstance(r, bool) or r < 0 for r in self.rows):
            raise ValidationError(f"rows are batch indices of 0 or more; got {list(self.rows)}.")

    @property
    def everywhere(self) -> bool:
        """Whether every token of every row is edited."""
        return self.tokens is None and self.rows is None and self.mask is None

    def active(self, batch: int, length: int, device: torch.device) -> Tensor:
        """[B, T] bool: the tokens of the running call that are edited.

        Raises:
            ValidationError: a row or mask that the call doesn't have, or tokens outside a followed call.
        """
        if self.mask is not None:
            if tuple(self.mask.shape) != (batch, length):
                raise ValidationError(
                    f"The mask has shape {list(self.mask.shape)}, but the call is [{batch}, {length}]."
                )
            return self.mask.to(device)
        chosen = torch.ones(batch, length, dtype=torch.bool, device=device)
        if self.rows is not None:
            if self.rows and max(self.rows) >= batch:
                raise ValidationError(
                    f"Row {max(self.rows)} was to be edited, but the batch has {batch} rows."
                )
            among = torch.zeros(batch, 1, dtype=torch.bool, device=device)
            among[list(self.rows)] = True
            chosen = chosen & among
        return chosen if self.tokens is None else chosen & selected(self.tokens, batch, length).to(device)


def selected(tokens: int | slice, batch: int, length: int) -> Tensor:
    seen = current_positions()
    if seen is None:
        raise ValidationError(
            "These edits name token positions, but nothing follows the model's calls here; attach them with "
            "hf_hooks_contextmanager or a SteeringPlan, or run inside mechanex.engine.hooks.positions(model)."
        )
    if seen.shape != (batch, length):
        raise ValidationError(
            f"The layer was given [{batch}, {length}] tokens, but the model {list(seen.shape)}."
        )
    return token_mask(tokens, seen)


class _LayerEdits:
    """All interventions at one layer; composes those that meet on a row, in order, into one table."""

    def __init__(self, interventions: list[Intervention]) -> None:
        self._interventions = interventions
        self._together: EditTable | None = None
        if all(i.everywhere for i in interventions):
            edit = interventions[0].edit
            for following in interventions[1:]:
                edit = edit.then(following.edit)
            self._together = EditTable([edit])
        self._changes_with_position = any(i.tokens is not None for i in interventions)
        self._tables: dict[tuple[tuple[int, ...], ...], EditTable] = {}
        self._known: tuple[tuple[int, int, torch.device], EditTable | None, Tensor] | None = None

    def __call__(self, hidden: Tensor) -> Tensor | None:
        if self._together is not None:
            return self._together.apply(hidden)
        batch, length = hidden.shape[:2]
        table, index = self._table(batch, length, hidden.device)
        return None if table is None else table.apply(hidden, index)

    def _table(self, batch: int, length: int, device: torch.device) -> tuple[EditTable | None, Tensor]:
        key = (batch, length, device)
        if self._known is not None and self._known[0] == key:
            return self._known[1], self._known[2]
        # Edit k of the table is a chain of interventions; a row moves to a longer chain each time one more
        # applies.
        chains: dict[tuple[int, ...], int] = {}
        index = torch.full((batch, length), -1, dtype=torch.int32, device=device)
        for i, intervention in enumerate(self._interventions):
            active = intervention.active(batch, length, device)
            moved = index.clone()
            known = list(chains)
            for k in torch.unique(index[active]).tolist():
                before = known[k] if k >= 0 else ()
                moved[active & (index == k)] = chains.setdefault((*before, i), len(chains))
            index = moved
        table = self._composed(tuple(chains))
        if not self._changes_with_position:
            self._known = (key, table, index)
        return table, index

    def _composed(self, chains: tuple[tuple[int, ...], ...]) -> EditTable | None:
        if not chains:
            return None
        if chains not in self._tables:
            self._tables[chains] = EditTable([self._compose(chain) for chain in chains])
        return self._tables[chains]

    def _compose(self, chain: tuple[int, ...]) -> Edit:
        edit = self._interventions[chain[0]].edit
        for i in chain[1:]:
            edit = edit.then(self._interventions[i].edit)
        return edit


class SteeringPlan:
    """A set of interventions that steers a model while it is applied.

    Several interventions on one row of one layer run in the order given. Example::

        plan = SteeringPlan([Intervention(3, Edit.add(v)), Intervention(5, Edit.ablate(w), tokens=slice(-1,
        None))]) with plan.apply(model):
            model.generate(...)
    """

    def __init__(self, interventions: Iterable[Intervention]) -> None:
        self.interventions = list(interventions)

    def apply(self, model: nn.Module | ModelAdapter) -> Handle:
        """Steers ``model`` until the returned handle is removed; the handle is also a context manager.

        Raises:
            ValidationError: a layer that the model doesn't have, or an edit of another width. Nothing is
                attached then.
        """
        adapter = adapter_for(model)
        by_layer: dict[int, list[Intervention]] = {}
        for intervention in self.interventions:
            if intervention.edit.width != adapter.d_model:
                raise ValidationError(
                    f"An edit at layer {intervention.layer} is {intervention.edit.width} wide, but the residual "
                    f"stream of {adapter.model_id} is {adapter.d_model} wide; the vector was made for another model."
                )
            by_layer.setdefault(adapter.layer_index(intervention.layer), []).append(intervention)
        tokens = any(i.tokens is not None for i in self.interventions)
        hooks: list[tuple[int, ResidualHook]] = [
            (n, _LayerEdits(found)) for n, found in sorted(by_layer.items())
        ]
        return attach(adapter, hooks, follow=tokens)


def attach(
    adapter: ModelAdapter, hooks: Iterable[tuple[int, ResidualHook]], *, follow: bool = False
) -> Handle:
    """Registers residual hooks, all or none; ``follow`` lets them ask for token positions."""
    handles = Handles()
    try:
        if follow:
            handles.add(adapter.track_positions())
        for layer, fn in hooks:
            handles.add(adapter.on_residual(layer, fn))
    except BaseException:
        handles.remove()
        raise
    return handles


def positions(model: nn.Module | ModelAdapter) -> Handle:
    """Follows a model's calls, so that hooks attached by other means can select tokens by absolute position.

    A context manager, and a handle with ``remove()``. Needed for ``make_steering_hook_tflens(token=…)``
    under a cache.
    """
    return adapter_for(model).track_positions()
