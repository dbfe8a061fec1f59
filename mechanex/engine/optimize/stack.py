"""Copies of a pack's rows, one for each job, in one pass: where they join, what edits them, and their losses."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ...ops.steer import steer
from ..forward import scored_logprobs
from ..hooks import attach
from ..models.adapter import Handles, ModelAdapter, ResidualHook
from ..models.offload import on_one_device
from ..passes import visit_residuals
from ..positions import Positions, given_positions
from ..regimes import text_lengths
from . import compiled
from .compiled import CompiledBlock
from .layout import StepPack
from .objective import completion_losses
from .parameters import Table
from .replay import Replay
from .settings import LossOptions

__all__ = ["EditHooks", "Stack", "StepGraphs"]

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


class Stack:
    """Copies of a pack's rows, one for each job, lowest layer first.

    Args:
        hooks: make the edits.
        step_pack: what one copy is.
        members: the layers that each job edits, by ascending lowest layer.
        n_slots: edits of each job.
        replay: of the pack that ``step_pack`` is, or that its ``rows`` are taken from.
        rows: which rows of that pack, None for all.
        graphs: where it runs so often that a CUDA graph is worth its memory; else None.
    """

    def __init__(
        self,
        hooks: EditHooks,
        step_pack: StepPack,
        members: tuple[tuple[int, ...], ...],
        n_slots: int,
        replay: Replay,
        rows: Tensor | None = None,
        graphs: StepGraphs | None = None,
    ) -> None:
        self._hooks, self._adapter = hooks, hooks.adapter
        self.step_pack, self._members, self._n_slots = step_pack, members, n_slots
        self._copies = step_pack.pack.repeated(len(members))
        alone = len(members) == 1 and rows is None
        replayed = replay.possible and (alone or replay.stackable)
        self._segments = self._plan(replay, rows) if replayed else None
        self._rows = {
            layer: self._slots(layer, replayed) for layer in sorted({n for m in members for n in m})
        }
        pack, width = self._copies, step_pack.pack.input_ids.shape[1]
        self._scored = pack.row * width + pack.predictor
        self._graphs = graphs if replayed and on_one_device(self._adapter.hf_model) else None
        self._compiled: list[CompiledBlock] = []
        self._runs: dict[LossOptions, Any] = {}

    def _plan(
        self, replay: Replay, rows: Tensor | None
    ) -> list[tuple[Any, Tensor | None, Any, tuple[Positions, Tensor]]]:
        """For every layer the block, what joins there, the block's other arguments, and the tokens' places."""
        starts = [self._start(layers) for layers in self._members]
        chosen = None if rows is None else replay.rows(rows)
        blocks, plan = self._adapter.layers, []
        n, places = 0, (self.step_pack.pack.positions, self.step_pack.pack.text_length)
        for layer in range(starts[0], len(blocks)):
            joins, fresh = starts.count(layer), None
            if joins:
                n += joins
                fresh = replay.residual(layer)
                fresh = fresh if rows is None else fresh[rows.to(fresh.device)]
                fresh = fresh if joins == 1 else fresh.repeat(joins, 1, 1)
                copies = self.step_pack.pack.repeated(n)
                places = (copies.positions, copies.text_length)
            if chosen is None:
                arguments = replay.arguments(layer, n, len(self._members))
            else:
                arguments = chosen[layer - replay.first]
            plan.append((blocks[layer], fresh, arguments, places))
        return plan

    def _start(self, layers: tuple[int, ...]) -> int:
        """The block that a job's copies join at; edits of what leaves the last block need that block's run."""
        return min(layers[0], self._adapter.n_layers - 1)

    def _slots(self, layer: int, replayed: bool) -> Tensor | None:
        """The edit of every token of the copies that are there at a layer; None if one edit serves all of them."""
        base = self.step_pack.slots
        if len(self._members) == 1 and self.step_pack.everywhere:
            return None
        copies = []
        for q, layers in enumerate(self._members):
            if self._start(layers) > layer and replayed:
                continue
            edits = layer in layers
            copies.append(
                torch.where(base >= 0, base + q * self._n_slots, -1) if edits else torch.full_like(base, -1)
            )
        return torch.cat(copies)

    def losses(self, table: Table, options: LossOptions) -> Tensor:
        """[J, P] losses of the pack's completions under each job's edits."""
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
        """[J·B, T, d_model] entering a layer that is above the lowest edited one."""
        if self._segments is not None:
            return self._replayed(table, layer - self._start(self._members[0]))
        seen: list[Tensor] = []
        with self._hooks.editing(self._rows, table):
            visit_residuals(self._adapter, self._copies, {layer: seen.append})
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
        logprobs = scored_logprobs(self._adapter, self._copies, hidden, coldness=options.coldness)
        logprobs = logprobs.view(len(self._members), -1).to(self.step_pack.slots.device)
        return completion_losses(logprobs, self.step_pack.order, options)
