"""Steering a model: many edits, at many layers, for some tokens or some rows of the batch, as one plan."""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from types import NoneType
from typing import Any, cast

import numpy
import torch
from torch import Tensor, nn

from .._private.torch import writes
from ..errors import ValidationError
from .attaching import hooks_on
from .chains import numbered
from .given import as_mask
from .intervention import Edit, EditTable
from .models import adapter_for
from .models.adapter import Handles, ModelAdapter, ResidualHook
from .positions import TokenSelector, check_tokens, followed, positions_are_given, selected
from .prompt_conditions import PromptCondition
from .schedules import Varying
from .whole import as_whole

_Chains = tuple[tuple[int, ...], ...]

__all__ = [
    "Applied",
    "Handle",
    "Intervention",
    "SteeringPlan",
    "as_interventions",
    "attach",
    "listed",
    "positions",
    "taken_over",
]

Handle = Handles

_KINDS: tuple[tuple[str, tuple[type, ...], str], ...] = (
    ("edit", (Edit,), "an Edit, such as Edit.add(vector)"),
    ("varying", (Varying, NoneType), "a schedule's Varying, or None"),
    ("condition", (PromptCondition, NoneType), "a PromptCondition, or None"),
)
"""Of an intervention's fields, what they are."""


@dataclass(frozen=True, eq=False)
class Intervention:
    """One edit at one layer, and where it applies.

    Args:
        layer: the block whose incoming residual stream is edited; negatives count from the end. Layer n of an n-layer
            model is the stream that leaves the last block, before the final norm.
        edit: what is done; its tensors are finite.
        tokens: an int or slice of absolute positions in the sequence, None for every token. Positions count from the
            first real token of a left-padded row, also under a cache; negatives from the end of the prompt: what
            ``generate`` was given, else the first call with a cache, or each call without one. Where a call's facts
            don't tell, the call raises a ValidationError that says what to do.
        rows: indices of the prompts of the batch, None for all. Beams and further sequences of a prompt belong to it.
        mask: [B, T] bool for exactly one shape of call, instead of ``tokens`` and ``rows``; a tensor, NumPy array
            or list.
        varying: edits by place that stand in for ``edit``, which is only looked at for its width then.
        condition: has to be met by a prompt for its text to be edited; the engine's own generation decides it.

    Raises:
        ValidationError: one of these is of another kind, or the edit holds NaN or infinite numbers.
    """

    layer: int
    edit: Edit
    tokens: TokenSelector = None
    rows: Sequence[int] | None = None
    mask: Tensor | None = None
    varying: Varying | None = field(default=None, kw_only=True)
    condition: PromptCondition | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.mask is not None:
            if self.tokens is not None or self.rows is not None:
                raise ValidationError("An intervention takes a mask, or tokens and rows; got both.")
            object.__setattr__(self, "mask", as_mask("A mask", self.mask))
        layer = as_whole(self.layer)
        if layer is None:
            raise ValidationError(f"A layer is an int; got {self.layer!r:.100}.")
        object.__setattr__(self, "layer", layer)
        object.__setattr__(self, "tokens", check_tokens(self.tokens))
        if self.rows is not None:
            object.__setattr__(self, "rows", _row_indices(self.rows))
        for name, kinds, example in _KINDS:
            if not isinstance(given := getattr(self, name), kinds):
                raise ValidationError(f"An intervention's {name} is {example}; got {type(given).__name__}.")
        self.edit.check_finite()

    @property
    def everywhere(self) -> bool:
        """Whether every token of every row is edited."""
        return self.tokens is None and self.rows is None and self.mask is None and self.varying is None

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
            seen = followed(batch, length)
            prompts, n = seen.prompts.to(device), seen.n_prompts
            if n is None and self.rows and not positions_are_given():
                n = int(prompts.max()) + 1
            if n is not None and max(self.rows, default=0) >= n:
                raise ValidationError(f"Row {max(self.rows)} was to be edited, but the batch has {n} rows.")
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


class _LayerEdits:
    """All interventions at one layer; composes those that meet on a row, in order, into one table."""

    def __init__(self, interventions: list[Intervention]) -> None:
        self._interventions = interventions
        self._everywhere = all(i.everywhere for i in interventions)
        self.traced = self._everywhere
        self._changes_with_call = any(
            i.tokens is not None or i.rows is not None or i.varying is not None for i in interventions
        )
        self._varies = any(i.varying is not None for i in interventions)
        self._tables: dict[_Chains, tuple[tuple[int, ...], EditTable]] = {}
        self._known: tuple[tuple[object, ...], _Chains, Tensor] | None = None

    def __call__(self, hidden: Tensor) -> Tensor | None:
        if self._everywhere:
            whole = tuple(range(len(self._interventions)))
            if torch.compiler.is_compiling():
                # Composed in the graph, whose inputs the edits' tensors are: other values need no other graph.
                return self._made((whole,)).apply(hidden)
            return None if _elsewhere.get() else self._table((whole,)).apply(hidden)
        if _elsewhere.get():
            return None
        if self._varies:
            return self._varied(hidden)
        chains, index = self._chains(hidden.shape[0], hidden.shape[1], hidden.device)
        return self._table(chains).apply(hidden, index) if chains else None

    def _chains(self, batch: int, length: int, device: torch.device) -> tuple[_Chains, Tensor]:
        """The chains of interventions that meet on some row, and [B, T] int32 which of them, or -1."""
        masks = [i.mask for i in self._interventions if i.mask is not None]
        key = (batch, length, device, *map(writes, masks))
        if self._known is not None and self._known[0] == key:
            return self._known[1], self._known[2]
        reached = torch.stack([i.active(batch, length, device) for i in self._interventions], -1)
        chains: dict[tuple[int, ...], int] = {}
        order = range(len(self._interventions))
        found = numbered(order, reached.flatten(0, 1).cpu().numpy(), chains)
        index = torch.from_numpy(found).view(batch, length).to(device)
        if not self._changes_with_call and not any(m.is_inference() for m in masks):
            self._known = (key, tuple(chains), index)
        return tuple(chains), index

    def _varied(self, hidden: Tensor) -> Tensor | None:
        """The edited stream where strengths depend on where a token stands."""
        batch, length = hidden.shape[:2]
        seen = followed(batch, length)
        last = (seen.prompt_lengths - 1).to(seen.index.device)
        places = (seen.index - last).expand(batch, length).flatten().cpu().numpy()
        edits: list[Edit] = []
        reached: list[Any] = []
        for one in self._interventions:
            active = (
                (one.active(batch, length, hidden.device).cpu() & (seen.index >= 0).cpu()).flatten().numpy()
            )
            spread = [(one.edit, active)] if one.varying is None else one.varying.spread(places, active)
            edits += [edit for edit, _ in spread]
            reached += [tokens for _, tokens in spread]
        if not edits:
            return None
        chains: dict[tuple[Edit, ...], int] = {}
        found = numbered(edits, numpy.stack(reached, -1), chains)
        if not chains:
            return None
        index = torch.from_numpy(found).view(batch, length).to(hidden.device)
        return EditTable.of_chains(list(chains)).apply(hidden, index)

    def _table(self, chains: _Chains) -> EditTable:
        """The table of these chains; kept while no tensor of an edit changes and none needs gradients."""
        versions = tuple(v for i in self._interventions for v in i.edit.versions())
        known = self._tables.get(chains)
        if known is not None and known[0] == versions:
            return known[1]
        table = self._made(chains)
        edits = [i.edit for i in self._interventions]
        # Inference tensors don't count what is written to them.
        if not any(e.requires_grad or any(t.is_inference() for t in e.tensors) for e in edits):
            self._tables[chains] = (versions, table)
        return table

    def _made(self, chains: _Chains) -> EditTable:
        return EditTable.of_chains([[self._interventions[i].edit for i in chain] for chain in chains])


def as_interventions(given: object) -> list[Intervention]:
    """One intervention, or several, as a list.

    Raises:
        ValidationError: something else.
    """
    # Of a mapping its keys would be walked through.
    several = isinstance(given, Iterable) and not isinstance(given, (str, Mapping, Tensor))
    listed: Iterable[Any] = cast("Iterable[Any]", given) if several else [given]
    found = []
    for one in listed:
        if not isinstance(one, Intervention):
            raise ValidationError(
                "A steering plan is made of interventions, such as Intervention(layer, Edit.add(vector)); "
                f"got {type(one).__name__}."
            )
        found.append(one)
    return found


class SteeringPlan:
    """A set of interventions that steers a model while it is applied.

    Several interventions on one row of one layer run in the order given. Example::

        plan = SteeringPlan([Intervention(3, Edit.add(v)), Intervention(5, Edit.ablate(w), tokens=slice(-1, None))])
        with plan.apply(model):
            model.generate(...)

    Args:
        interventions: one or several.

    Raises:
        ValidationError: something else.
    """

    def __init__(self, interventions: Iterable[Intervention]) -> None:
        self.interventions = as_interventions(interventions)

    def apply(self, model: nn.Module | ModelAdapter) -> Handle:
        """Steers ``model`` until the returned handle is removed; the handle is also a context manager.

        Raises:
            ValidationError: a layer that the model doesn't have, or an edit of another width. Nothing is
                attached then.
        """
        adapter = adapter_for(model)
        placed = self.placed(adapter)
        by_layer: dict[int, list[Intervention]] = {}
        for intervention in placed:
            if intervention.condition is not None:
                raise ValidationError(
                    "Whether a prompt meets a condition is decided while the engine generates: give the vector to "
                    "generate, generate_batch or a server, or attach it without its condition."
                )
            by_layer.setdefault(intervention.layer, []).append(intervention)
        asks = any(
            i.tokens is not None or i.rows is not None or i.varying is not None for i in self.interventions
        )
        hooks: list[tuple[int, ResidualHook]] = [
            (n, _LayerEdits(found)) for n, found in sorted(by_layer.items())
        ]
        return listed(adapter, lambda: attach(adapter, hooks, follow=asks), placed)

    def placed(self, model: nn.Module | ModelAdapter) -> list[Intervention]:
        """The interventions with layers of 0 or more, found to fit the model.

        Raises:
            ValidationError: a layer that the model doesn't have, or an edit of another width.
        """
        adapter = adapter_for(model)
        for one in self.interventions:
            if one.edit.width != adapter.d_model:
                raise ValidationError(
                    f"An edit at layer {one.layer} is {one.edit.width} wide, but the residual "
                    f"stream of {adapter.model_id} is {adapter.d_model} wide; the vector was made for another model."
                )
        return [replace(one, layer=adapter.layer_index(one.layer)) for one in self.interventions]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the plan to a ``.safetensors`` file, its schedules and conditions included.

        Raises:
            ValidationError: another suffix, or a schedule that is a function.
        """
        from .plan_files import write_plan

        write_plan(path, self.interventions)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SteeringPlan:
        """Reads a plan that :meth:`save` wrote.

        Raises:
            NotFoundError: there is no such file.
            ValidationError: the file is not a sound plan; names the file and the problem.
        """
        from .plan_files import read_plan

        return cls(Intervention(**one) for one in read_plan(path))

    def __repr__(self) -> str:
        layers = ", ".join(str(one.layer) for one in self.interventions)
        return f"SteeringPlan({len(self.interventions)} interventions at layers {layers})"


@dataclass(frozen=True, eq=False)
class Applied:
    """A plan that steers a model now, or hooks beside it.

    Args:
        interventions: with layers of 0 or more; none for hooks that edit every token alike wherever they are, as long
            as they are there, so that a captured step has them in it.
        hooks: ids of the hooks that do it.
    """

    interventions: tuple[Intervention, ...]
    hooks: frozenset[int]


def listed(
    adapter: ModelAdapter, attached: Callable[[], Handle], interventions: Iterable[Intervention] = ()
) -> Handle:
    """Attaches hooks that are known as ours, as :class:`Applied` has them, until the handle is removed."""
    before = hooks_on(adapter.hf_model)
    handle = attached()
    applied = Applied(tuple(interventions), hooks_on(adapter.hf_model) - before)
    adapter.kept.applied.append(applied)
    handle.add(_Listed(applied, adapter.kept.applied))
    return handle


class _Listed:
    """The place of a plan in the list of those that are applied, until it is removed."""

    def __init__(self, applied: Applied, listed: list[Applied]) -> None:
        self._applied, self._listed = applied, listed

    def remove(self) -> None:
        if self._applied in self._listed:
            self._listed.remove(self._applied)


_elsewhere: ContextVar[bool] = ContextVar("mechanex_taken_over", default=False)


@contextmanager
def taken_over() -> Iterator[None]:
    """Runs a block in which somebody else does what applied plans would; their hooks leave the model's calls alone."""
    token = _elsewhere.set(True)
    try:
        yield
    finally:
        _elsewhere.reset(token)


def attach(
    adapter: ModelAdapter, hooks: Iterable[tuple[int, ResidualHook]], *, follow: bool = False
) -> Handle:
    """Registers residual hooks, all or none; ``follow`` lets them ask for token positions and rows."""
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


def positions(model: nn.Module | ModelAdapter, *, prompt_tokens: int | None = None) -> Handle:
    """Follows a model's calls, so that hooks attached by other means can select tokens by absolute position.

    A context manager, and a handle with ``remove()``. Needed for ``make_steering_hook_tflens(token=…)``
    under a cache.

    Args:
        model: the model.
        prompt_tokens: where the prompts end, padding included. For a loop of your own that reads the prompt in several
            calls, or runs the grown text without a cache: single calls don't tell. ``generate`` needs none.

    Raises:
        ValidationError: prompt_tokens is no number of tokens.
    """
    columns = as_whole(prompt_tokens)
    if prompt_tokens is not None and (columns is None or columns < 1):
        raise ValidationError(f"prompt_tokens is a number of tokens, at least 1; got {prompt_tokens!r}.")
    return adapter_for(model).track_positions(prompt_tokens=columns)
