"""Copies of a pack's rows, one for each job, in one pass: where they join, what edits them, and their losses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..forward import scored_logprobs
from ..models.adapter import ModelAdapter
from ..models.offload import on_one_device
from ..passes import visit_residuals
from ..positions import Positions, given_positions
from ..regimes import text_lengths
from .capture import captured
from .layout import StepPack
from .losses import completion_losses
from .parameters import Table
from .replay import Replay
from .settings import LossOptions

__all__ = ["Running", "Stack"]


@dataclass
class Running:
    """The edits of the pass that is running; ``rows`` by layer, None where one edit serves every token."""

    rows: dict[int, Tensor | None]
    table: Table


class Runner(Protocol):
    """Whose hooks make the edits of the pass that is running."""

    adapter: ModelAdapter
    running: Running | None


class Stack:
    """Copies of a pack's rows, one for each job, lowest layer first.

    Args:
        passes: who runs it.
        step_pack: what one copy is.
        members: the layers that each job edits, by ascending lowest layer.
        n_slots: edits of each job.
        replay: of the pack that ``step_pack`` is, or that its ``rows`` are taken from.
        rows: which rows of that pack, None for all.
        capture: whether it runs so often that a CUDA graph is worth its memory.
    """

    def __init__(
        self,
        passes: Runner,
        step_pack: StepPack,
        members: tuple[tuple[int, ...], ...],
        n_slots: int,
        replay: Replay,
        rows: Tensor | None = None,
        capture: bool = False,
    ) -> None:
        self._passes, self.step_pack, self._members, self._n_slots = passes, step_pack, members, n_slots
        self._copies = step_pack.pack.repeated(len(members))
        alone = len(members) == 1 and rows is None
        replayed = replay.possible and (alone or replay.stackable)
        self._segments = self._plan(replay, rows) if replayed else None
        self._rows = {
            layer: self._slots(layer, replayed) for layer in sorted({n for m in members for n in m})
        }
        pack, width = self._copies, step_pack.pack.input_ids.shape[1]
        self._scored = pack.row * width + pack.predictor
        self._losses = self._whole_losses if not replayed else self._replayed_losses
        self._capture = capture and replayed and on_one_device(passes.adapter.hf_model)
        self._runs: dict[LossOptions, Any] = {}

    def _plan(
        self, replay: Replay, rows: Tensor | None
    ) -> list[tuple[Any, Tensor | None, Any, tuple[Positions, Tensor]]]:
        """For every layer the block, what joins there, the block's other arguments, and the tokens' places."""
        starts = [self._start(layers) for layers in self._members]
        chosen = None if rows is None else replay.rows(rows)
        blocks, plan = self._passes.adapter.layers, []
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
        return min(layers[0], self._passes.adapter.n_layers - 1)

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

            def run(*table: Tensor) -> Tensor:
                return self._losses(table, options)

            if self._capture and table[0].requires_grad:
                run = captured(run, table)
                self._runs[options] = run
        losses: Tensor = run(*table)
        return losses

    def residual(self, table: Table | None, layer: int) -> Tensor:
        """[J·B, T, d_model] entering a layer that is above the lowest edited one."""
        if self._segments is not None:
            return self._replayed(table, layer - self._start(self._members[0]))
        seen: list[Tensor] = []
        self._passes.running = None if table is None else Running(self._rows, table)
        try:
            visit_residuals(self._passes.adapter, self._copies, {layer: seen.append})
        finally:
            self._passes.running = None
        return seen[0]

    def _replayed(self, table: Table | None, n_layers: int | None = None) -> Tensor:
        """What comes out of the first ``n_layers`` layers from the lowest edited one up."""
        assert self._segments is not None
        self._passes.running = None if table is None else Running(self._rows, table)
        hidden: Tensor | None = None
        try:
            for block, fresh, (args, kwargs), (positions, lengths) in self._segments[:n_layers]:
                if fresh is not None:
                    hidden = fresh if hidden is None else torch.cat([hidden, fresh])
                with given_positions(positions), text_lengths(lengths):
                    out = block(hidden, *args, **kwargs)
                hidden = out[0] if isinstance(out, tuple) else out
        finally:
            self._passes.running = None
        assert hidden is not None
        return hidden

    def _replayed_losses(self, table: Table, options: LossOptions) -> Tensor:
        hidden = self._replayed(table)
        rows = hidden.flatten(0, 1).index_select(0, self._scored.to(hidden.device))
        return self._scores(self._passes.adapter.finish(rows), options)

    def _whole_losses(self, table: Table, options: LossOptions) -> Tensor:
        self._passes.running = Running(self._rows, table)
        try:
            return self._scores(None, options)
        finally:
            self._passes.running = None

    def _scores(self, hidden: Tensor | None, options: LossOptions) -> Tensor:
        logprobs = scored_logprobs(self._passes.adapter, self._copies, hidden, coldness=options.coldness)
        logprobs = logprobs.view(len(self._members), -1).to(self.step_pack.slots.device)
        return completion_losses(logprobs, self.step_pack.order, options)
