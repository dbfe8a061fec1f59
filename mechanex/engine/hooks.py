"""Steering a model: many edits, at many layers, for some tokens or some rows of the batch, as one plan."""

from __future__ import annotations

import logging
import operator
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import ValidationError
from .intervention import Edit, EditTable, composed
from .models import adapter_for
from .models.adapter import Handles, ModelAdapter, ResidualHook
from .positions import TokenSelector, check_tokens, current_positions, running_pack, token_mask

_log = logging.getLogger(__name__)

_Chains = tuple[tuple[int, ...], ...]

__all__ = ["Handle", "Intervention", "SteeringPlan", "positions"]

Handle = Handles


@dataclass(frozen=True, eq=False)
class Intervention:
    """One edit at one layer, and where it applies.

    Args:
        layer: the block whose incoming residual stream is edited; negatives count from the end.
        edit: what is done; its tensors are finite.
        tokens: an int or slice of absolute positions in the sequence, None for every token. Negatives count from the
            end of the prompt; positions from the first real token of a left-padded row, also under a cache.
        rows: indices of the rows of the batch that the model is called with, None for all. Beam search and several
            sequences per prompt make more rows than there are prompts.
        mask: [B, T] bool for exactly one shape of call, instead of ``tokens`` and ``rows``.

    Raises:
        ValidationError: one of these is of another kind, or the edit holds NaN or infinite numbers.
    """

    layer: int
    edit: Edit
    tokens: TokenSelector = None
    rows: Sequence[int] | None = None
    mask: Tensor | None = None

    def __post_init__(self) -> None:
        if self.mask is not None:
            if self.tokens is not None or self.rows is not None:
                raise ValidationError("An intervention takes a mask, or tokens and rows; got both.")
            if self.mask.dtype != torch.bool or self.mask.ndim != 2:
                raise ValidationError(
                    f"A mask is [batch, tokens] of bool; got {list(self.mask.shape)} of {self.mask.dtype}."
                )
        check_tokens(self.tokens)
        if self.rows is not None:
            object.__setattr__(self, "rows", _row_indices(self.rows))
        self.edit.check_finite()

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
            prompts = _prompts(batch, self.rows).to(device)
            among = torch.isin(prompts, torch.tensor(self.rows, dtype=torch.long, device=device))
            chosen = chosen & among[:, None]
        return chosen if self.tokens is None else chosen & selected(self.tokens, batch, length).to(device)


def _row_indices(rows: Sequence[int]) -> tuple[int, ...]:
    try:
        found = tuple(operator.index(row) for row in rows)
    except TypeError:
        found = (-1,)
    if any(row < 0 for row in found) or any(isinstance(row, bool) for row in rows):
        raise ValidationError(f"rows are batch indices of 0 or more; got {rows!r}.")
    return found


def _prompts(batch: int, rows: Sequence[int]) -> Tensor:
    """[B] int64: the prompt of the batch that each row of the running call continues."""
    own = running_pack()
    if own is None:
        if rows and max(rows) >= batch:
            raise ValidationError(f"Row {max(rows)} was to be edited, but the batch has {batch} rows.")
        return torch.arange(batch)
    if own.prompts is None:
        raise ValidationError(
            "An intervention names rows of a batch, but here the engine lays out its own batches; "
            "steer by tokens, or remove the plan around this call."
        )
    return own.prompts


def selected(tokens: int | slice, batch: int, length: int) -> Tensor:
    """[B, T] bool: the tokens of the running call at these absolute positions.

    Raises:
        ValidationError: nothing follows the model's calls, or the layer was given another shape than the model.
    """
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
        self._everywhere = all(i.everywhere for i in interventions)
        self._changes_with_position = any(i.tokens is not None for i in interventions)
        self._by_batch_row = any(i.rows is not None for i in interventions)
        self._tables: dict[_Chains, tuple[tuple[int, ...], EditTable]] = {}
        self._known: tuple[tuple[int, int, torch.device], _Chains, Tensor] | None = None

    def __call__(self, hidden: Tensor) -> Tensor | None:
        if self._everywhere:
            return self._composed((tuple(range(len(self._interventions))),)).apply(hidden)
        chains, index = self._chains(hidden.shape[0], hidden.shape[1], hidden.device)
        return self._composed(chains).apply(hidden, index) if chains else None

    def _chains(self, batch: int, length: int, device: torch.device) -> tuple[_Chains, Tensor]:
        """The chains of interventions that meet on some row, and [B, T] int32 which of them, or -1."""
        key = (batch, length, device)
        own_rows = self._by_batch_row and running_pack() is not None
        if self._known is not None and self._known[0] == key and not own_rows:
            return self._known[1], self._known[2]
        # A row moves to a longer chain each time one more intervention applies to it.
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
        if not self._changes_with_position:
            self._known = (key, tuple(chains), index)
        return tuple(chains), index

    def _composed(self, chains: _Chains) -> EditTable:
        """The table of these chains; kept while no tensor of an edit changes and none needs gradients."""
        versions = tuple(v for i in self._interventions for v in i.edit.versions())
        known = self._tables.get(chains)
        if known is not None and known[0] == versions:
            return known[1]
        table = EditTable([self._compose(chain) for chain in chains])
        if not any(i.edit.requires_grad for i in self._interventions):
            self._tables[chains] = (versions, table)
        return table

    def _compose(self, chain: tuple[int, ...]) -> Edit:
        return composed([self._interventions[i].edit for i in chain])


class SteeringPlan:
    """A set of interventions that steers a model while it is applied.

    Several interventions on one row of one layer run in the order given. Example::

        plan = SteeringPlan([Intervention(3, Edit.add(v)), Intervention(5, Edit.ablate(w), tokens=slice(-1, None))])
        with plan.apply(model):
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
        handles.add(recompiling())
        if follow:
            handles.add(adapter.track_positions())
        for layer, fn in hooks:
            handles.add(adapter.on_residual(layer, fn))
    except BaseException:
        handles.remove()
        raise
    return handles


class recompiling:
    """Drops torch's compiled code now and when removed: it doesn't notice that hooks came or went.

    Nothing happens where nothing was compiled.
    """

    def __init__(self) -> None:
        self.remove()

    def remove(self) -> None:
        """Drops what is compiled now."""
        dynamo = sys.modules.get("torch._dynamo")
        if dynamo is not None and dynamo.utils.counters["frames"]["total"]:
            _log.info(
                "Hooks of a model changed: torch's compiled code is dropped and made again when called."
            )
            dynamo.reset()


def positions(model: nn.Module | ModelAdapter) -> Handle:
    """Follows a model's calls, so that hooks attached by other means can select tokens by absolute position.

    A context manager, and a handle with ``remove()``. Needed for ``make_steering_hook_tflens(token=…)``
    under a cache.
    """
    return adapter_for(model).track_positions()
