"""Rows of a pack, each job's own, in one pass: where they join, what edits them, and their losses."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...ops.steer import steer
from ..forward import scored_logprobs
from ..hooks import attach
from ..models.adapter import Handles, ModelAdapter, ResidualHook
from ..models.offload import on_one_device
from ..pack import Pack
from ..passes import visit_residuals
from ..positions import Positions, given_positions
from ..regimes import text_lengths
from . import compiled
from .compiled import CompiledBlock
from .layout import StepPack, TokenOrder
from .objective import completion_losses
from .parameters import Table
from .replay import Replay
from .settings import LossOptions

__all__ = ["EditHooks", "Member", "Stack", "StepGraphs"]

_log = logging.getLogger(__name__)


class EditHooks:
    """The hooks that edit the pass that is running; a context manager, inside of which the model carries them.

    Args:
        adapter: the model.
        layers: every layer that any pass edits.
    """

    def __init__(self, adapter: ModelAdapter, layers: Iterable[int]) -> None:
        self.adapter, self._layers = adapter, sorted(layers)
        self._handles: Handles | None = None
        self._rows: Mapping[int, Tensor | None] = {}
        self._table: Table = ()

    def __enter__(self) -> EditHooks:
        self._handles = attach(self.adapter, [(layer, self._editor(layer)) for layer in self._layers])
        return self

    def __exit__(self, *exc: object) -> None:
        if self._handles is not None:
            self._handles.remove()

    @contextmanager
    def editing(self, rows: Mapping[int, Tensor | None], table: Table | None) -> Iterator[None]:
        """Passes inside are edited by a table's rows.

        Args:
            rows: by layer the row for every token; None where the one row serves all, no entry for no edits.
            table: the edits; None for none at all.
        """
        self._rows, self._table = ({}, ()) if table is None else (rows, table)
        try:
            yield
        finally:
            self._rows, self._table = {}, ()

    def _editor(self, layer: int) -> ResidualHook:
        def edit(hidden: Tensor) -> Tensor | None:
            if layer not in self._rows:
                return None
            rows, table = self._rows[layer], self._table
            if table[0].device != hidden.device:
                table = tuple(t.to(hidden.device) for t in table)
                rows = None if rows is None else rows.to(hidden.device)
            return steer(hidden, rows, *table)

        return edit


class StepGraphs:
    """CUDA graphs of steps: their shapes never change, so that a GPU can be given the whole work of one at once."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def of(
        self,
        run: Callable[..., Tensor],
        inputs: tuple[Tensor, ...],
        captured: Callable[..., Tensor] | None = None,
    ) -> Callable[..., Tensor]:
        """``run`` as CUDA graphs of its forward and backward passes, or ``run`` itself where that can't be.

        Args:
            run: from tensors that require gradients to one tensor; does the same work at every call.
            inputs: an example of its arguments, which are of these shapes at every call.
            captured: what computes the same and is captured in its place; None: ``run`` itself.
        """
        if inputs[0].device.type != "cuda":
            return run
        sample = tuple(t.detach().clone().requires_grad_() for t in inputs)
        try:
            graphed: Callable[..., Tensor] = torch.cuda.make_graphed_callables(captured or run, sample)  # type: ignore[assignment]
        except Exception as error:  # a model's own code may wait for the GPU, or choose by what it computed
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            if reason not in self._told:
                self._told.add(reason)
                _log.info(
                    "The optimization step is not captured in a CUDA graph, which makes it slower: %s", reason
                )
            torch.cuda.synchronize(inputs[0].device)
            return run
        return graphed


@dataclass(frozen=True, eq=False)
class Member:
    """What a job brings to a pass.

    Args:
        layers: that it edits.
        part: its rows, and what is scored in them.
        rows: which rows of the replayed pack these are; None for all.
    """

    layers: tuple[int, ...]
    part: StepPack
    rows: Tensor | None = None


class Stack:
    """Rows of a pack, each job's own, one job's after another's, lowest layer first; jobs may take the same.

    Args:
        hooks: make the edits.
        members: the jobs, by ascending lowest layer.
        n_slots: edits of each job.
        replay: of the pack that the rows are taken from.
        graphs: where it runs so often that a CUDA graph is worth its memory; else None.

    Attributes:
        members: as given.
    """

    def __init__(
        self,
        hooks: EditHooks,
        members: Sequence[Member],
        n_slots: int,
        replay: Replay,
        graphs: StepGraphs | None = None,
    ) -> None:
        self._hooks, self._adapter = hooks, hooks.adapter
        self.members, self._n_slots = members, n_slots
        self._pack = Pack.joined([one.part.pack for one in members])
        self._order = TokenOrder.joined([one.part.order for one in members])
        whole = all(one.rows is None for one in members)
        replayed = replay.possible and ((whole and len(members) == 1) or replay.stackable)
        self._segments = self._plan(replay, whole) if replayed else None
        self._rows = {
            layer: self._slots(layer, replayed)
            for layer in sorted({n for one in members for n in one.layers})
        }
        pack = self._pack
        self._scored = pack.row * pack.input_ids.shape[1] + pack.predictor
        self._graphs = graphs if replayed and on_one_device(self._adapter.hf_model) else None
        self._compiled: list[CompiledBlock] = []
        self._runs: dict[LossOptions, Any] = {}

    def _plan(
        self, replay: Replay, whole: bool
    ) -> list[tuple[Any, Tensor | None, Any, tuple[Positions, Tensor]]]:
        """For every layer the block, what joins there, the block's other arguments, and the tokens' places."""
        starts = [self._start(one) for one in self.members]
        n_rows = [len(one.part.slots) for one in self.members]
        device = self._pack.input_ids.device
        chosen = None
        if not whole:
            taken = (
                torch.arange(len(m.part.slots), device=device) if m.rows is None else m.rows
                for m in self.members
            )
            chosen = replay.rows(torch.cat(list(taken)))
        blocks, plan, positions = self._adapter.layers, [], self._pack.positions
        for layer in range(starts[0], len(blocks)):
            joining = [
                _taken(replay.residual(layer), one.rows)
                for one, start in zip(self.members, starts, strict=True)
                if start == layer
            ]
            fresh = torch.cat(joining) if len(joining) > 1 else next(iter(joining), None)
            present = sum(start <= layer for start in starts)
            n, of = sum(n_rows[:present]), sum(n_rows)
            if chosen is None:
                arguments = replay.arguments(layer, present, len(starts))
            else:
                arguments = replay.beginning(layer, chosen[layer - replay.first], n, of)
            places = Positions(positions.index[:n], positions.prompt_lengths[:n]), self._pack.text_length[:n]
            plan.append((blocks[layer], fresh, arguments, places))
        return plan

    def _start(self, member: Member) -> int:
        """The block that a job's rows join at; edits of what leaves the last block need that block's run."""
        return min(member.layers[0], self._adapter.n_layers - 1)

    def _slots(self, layer: int, replayed: bool) -> Tensor | None:
        """The edit of every token of the rows that are there at a layer; None if one edit serves all of them."""
        if len(self.members) == 1 and self.members[0].part.everywhere:
            return None
        found = []
        for q, one in enumerate(self.members):
            if replayed and self._start(one) > layer:
                continue
            base = one.part.slots
            edited = layer in one.layers
            found.append(
                torch.where(base >= 0, base + q * self._n_slots, -1) if edited else torch.full_like(base, -1)
            )
        return torch.cat(found)

    def losses(self, table: Table, options: LossOptions) -> Tensor:
        """[P] losses of each job's completions under its edits, one job's after another's."""
        run = self._runs.get(options)
        if run is None:
            # What is kept here must not hold the stack, which would live on with its model.
            stack = weakref.proxy(self)

            def run(*table: Tensor) -> Tensor:
                found: Tensor = stack._losses(table, options)
                return found

            def run_compiled(*table: Tensor) -> Tensor:
                found: Tensor = stack._losses(table, options, stack._compiled_blocks())
                return found

            if self._graphs is not None and table[0].requires_grad:
                captured = run_compiled if self._segments is not None and compiled.wanted() else None
                run = self._runs[options] = self._graphs.of(run, table, captured)
        losses: Tensor = run(*table)
        return losses

    def residual(self, table: Table | None, layer: int) -> Tensor:
        """[B, T, d_model] entering a layer that is above the lowest edited one."""
        if self._segments is not None:
            return self._replayed(table, layer - self._start(self.members[0]))
        seen: list[Tensor] = []
        with self._hooks.editing(self._rows, table):
            visit_residuals(self._adapter, self._pack, {layer: seen.append})
        return seen[0]

    def _compiled_blocks(self) -> Sequence[CompiledBlock]:
        """The layers that are replayed, as torch compiles them."""
        if not self._compiled and self._segments is not None:
            self._compiled = [CompiledBlock(block) for block, *_ in self._segments]
        return self._compiled

    def _replayed(
        self,
        table: Table | None,
        n_layers: int | None = None,
        blocks: Sequence[CompiledBlock] | None = None,
    ) -> Tensor:
        """What comes out of the first ``n_layers`` layers from the lowest edited one up, or of these in their place."""
        assert self._segments is not None
        hidden: Tensor | None = None
        with self._hooks.editing(self._rows, table):
            for i, (block, fresh, (args, kwargs), (positions, lengths)) in enumerate(
                self._segments[:n_layers]
            ):
                if fresh is not None:
                    hidden = fresh if hidden is None else torch.cat([hidden, fresh])
                with given_positions(positions), text_lengths(lengths):
                    out = (block if blocks is None else blocks[i])(hidden, *args, **kwargs)
                hidden = out[0] if isinstance(out, tuple) else out
        assert hidden is not None
        return hidden

    def _losses(
        self, table: Table, options: LossOptions, blocks: Sequence[CompiledBlock] | None = None
    ) -> Tensor:
        if self._segments is None:
            with self._hooks.editing(self._rows, table):
                return self._scores(None, options)
        hidden = self._replayed(table, blocks=blocks)
        rows = hidden.flatten(0, 1).index_select(0, self._scored.to(hidden.device))
        return self._scores(self._adapter.finish(rows), options)

    def _scores(self, hidden: Tensor | None, options: LossOptions) -> Tensor:
        logprobs = scored_logprobs(self._adapter, self._pack, hidden, coldness=options.coldness)
        return completion_losses(logprobs.to(self._pack.input_ids.device), self._order, options)


def _taken(residual: Tensor, rows: Tensor | None) -> Tensor:
    return residual if rows is None else residual[rows.to(residual.device)]
