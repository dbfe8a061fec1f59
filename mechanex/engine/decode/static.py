"""Steps over tensors that stay where they are: on a GPU captured once as a CUDA graph, and replayed.

Rows have slots, the first ones of as many as there is room for. What changes from step to step (tokens, lengths, who is
steered how) is copied into the tensors that the graph reads; one is captured for each number of rows and of columns, of
a few that hold any others.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ... import backends
from ..._private.torch import is_compiled
from ..attaching import changes, hooks_on, hooks_on_all
from ..attention_plans import with_plans
from ..capabilities.packing import packing_form
from ..hooks import Intervention, attach, taken_over
from ..intervention import Edit
from ..limits import window_of
from ..memory import total_bytes
from ..models.adapter import Handles, ModelAdapter
from ..pack import TREES
from ..positions import Positions
from ..regimes import first_change
from .cache import Unmergeable
from .calls import Calls, Carried, StepInputs
from .graphs import autocast_on, state_of
from .grouped import grouped_attention
from .reading import Numbers, Reading
from .request import Steer
from .row import Row
from .slot_steering import SlotSteering
from .slots import SlotCache
from .static_step import StaticStep, bucket, sight_mask
from .steering import RowSteering, Span

__all__ = ["StaticBatch"]

_FEWEST_COLUMNS = 128
_FEWEST_ROWS = 8
_FORESEEN = 512  # columns that rows which may grow so long are given at once
_AMPLE_SHARE = 32  # of the device's memory that more room than needed may take
_LOOK = 32  # steps after which the model is looked at anew for what others did to it
_IDLE_SHARE = 8  # of the device's memory that may be held between uses
_OURS = "a captured step is seen by no hook, and asks for no positions"


class StaticBatch:
    """A batch whose rows have slots; see :class:`mechanex.engine.decode.batch.Batch`.

    Args:
        adapter: the model.
        calls: makes its calls.
        steering: of the decoder's other calls.

    Raises:
        Unmergeable: the model takes no mask that says which token sees which.
    """

    def __init__(self, adapter: ModelAdapter, calls: Calls, steering: RowSteering) -> None:
        self._adapter, self._calls, self._steering = adapter, calls, steering
        self._step: StaticStep | None = None
        self._name = ""
        self._handles = Handles()
        self._hooked: frozenset[int] = frozenset()
        self._running = False
        # Who else looks on, as it was when the model was looked at last.
        self._watched = False
        self._plan: tuple[Intervention, ...] = ()
        self._seen: int | None = None
        self._since_look = 0
        self._numbers: Numbers | None = None
        self._spans: list[Span] | None = None
        self._moving = False  # whether an edit depends on where a token stands
        self._edits: list[Edit] = []
        self._versions: list[tuple[int, ...]] = []  # of the edits, as they were copied into place
        window = window_of(adapter)
        self._window = window
        self._masks = packing_form(adapter, (window or 0) + 1)
        if self._masks not in TREES:
            raise Unmergeable(f"{adapter.model_id} takes no mask that says which token sees which.")
        if first_change(adapter.hf_model) is not None:
            raise Unmergeable(f"{adapter.model_id} computes otherwise from some length of its texts on.")
        self.columns = 0
        self.kept: Carried | None = None

    def admit(self, rows: Sequence[Row], reading: Reading, places: Sequence[int]) -> None:
        """Adds rows that were read."""
        assert reading.kept is not None
        ((self._name, source),) = reading.kept.items()
        step = self._taken(source)
        lengths = [row.length for row in rows]
        longest = max(*lengths, self.columns)
        last = max(longest, *(row.final_length for row in rows))
        ample = min(last, max(2 * longest, _FORESEEN)) + 1
        self._reserve(step, step.cache.n + len(rows), longest + 1, ample, source)
        step.cache.admit(source, places, lengths)
        self.columns = longest
        self._changed()

    def step(self, rows: Sequence[Row], unread: Tensor | None, latest: Tensor | None) -> Tensor:
        """[rows, vocabulary] logits of each row's next token."""
        step, n = self._step, len(rows)
        assert step is not None
        self._look()
        self._reserve(step, n, self.columns + 1, 2 * self.columns)
        replaced = step.steering.replaced
        if self._spans is None:
            ahead = int(unread is not None)
            lengths = [row.length + ahead for row in rows]
            step.lay_out(lengths)
            ids = torch.tensor([row.chosen[-1] for row in rows]) if unread is None else unread
            step.ids[:n, 0] = ids.to(step.ids.device, non_blocking=True)
            self._numbers = Numbers(rows, step.ids.device)
            self._spans = [
                Span(self._steers(row), len(row.ids), length, row.request.onlooker)
                for row, length in zip(rows, lengths, strict=True)
            ]
            steers = [steer for span in self._spans for steer in span.steering]
            self._edits = list({id(steer.edit): steer.edit for steer in steers}.values())
            self._moving = any(not steer.is_fixed for steer in steers)
            self._place(step)
        else:
            assert latest is not None
            step.ids[:n, 0] = latest
            for span in self._spans:
                span.first += 1
            if self._moving or self._written():
                self._place(step)
        if step.steering.replaced != replaced:
            step.graphs.clear()
        columns = bucket(self.columns + 1, _FEWEST_COLUMNS)
        logits = self._run(step, n, min(columns, step.cache.columns))
        self.columns += 1
        return logits[:n, -1]

    def _place(self, step: StaticStep) -> None:
        """Copies the edits of the next step into place."""
        assert self._spans is not None
        self._versions = [edit.versions() for edit in self._edits]
        step.steering.prepare(self._spans, step.cache.rows)

    def _written(self) -> bool:
        """Whether an edit was written to since; many are looked at once in a while only."""
        if len(self._edits) > _LOOK and self._since_look:
            return False
        return [edit.versions() for edit in self._edits] != self._versions

    def leave(self, place: int) -> None:
        """Takes the row at this place out."""
        assert self._step is not None
        self._step.cache.drop(place)
        self._changed()

    def trim(self, longest: int) -> None:
        """Says that no row has more tokens than this."""
        self.columns = longest

    def clear(self) -> None:
        """Takes all rows out."""
        if self._step is not None:
            self._step.cache.clear()
        self.columns, self.kept = 0, None
        self._changed()

    def detach(self) -> None:
        """Leaves the model as it was, and without rows what it stepped over to whoever decodes next."""
        self._leave_model()
        self._seen = None
        if self._step is not None and not self._step.cache.n:
            if self._step.n_bytes <= total_bytes(self._adapter.device) // _IDLE_SHARE:
                self._step.steering.forget()
                self._adapter.kept.step = self._step
            self._step = None

    def _taken(self, like: Any) -> StaticStep:
        """The step that this batch is over: one that was left, or a new one."""
        if self._step is None:
            self._step, self._adapter.kept.step = self._adapter.kept.step, None
        adapter = self._adapter
        if self._step is None or not self._step.cache.suits(like):
            steering = SlotSteering(adapter.d_model, adapter.device, adapter.dtype)
            self._step = StaticStep(SlotCache(like), steering, adapter.device)
        self.kept = {self._name: self._step.cache}
        return self._step

    def _reserve(self, step: StaticStep, rows: int, columns: int, ample: int = 0, like: Any = None) -> None:
        """Makes room for so many rows of so many columns, or of ``ample`` ones where that takes little memory."""
        cache = step.cache
        if rows <= cache.rows and columns <= cache.columns:
            return
        each = cache.column_bytes or _bytes_of(like)
        # Moving to a larger place voids what was captured: a small one takes more room than it needs now.
        more = max(bucket(rows), 2 * cache.rows if rows > cache.rows else cache.rows, _FEWEST_ROWS)
        for n_rows, n_columns in ((more, ample), (bucket(rows), ample), (bucket(rows), columns)):
            n_rows, n_columns = (
                max(n_rows, cache.rows),
                max(bucket(n_columns, _FEWEST_COLUMNS), cache.columns),
            )
            if each * n_rows * n_columns <= total_bytes(self._adapter.device) // _AMPLE_SHARE:
                break
        else:
            n_rows, n_columns = max(rows, cache.rows), max(-(-columns // 128) * 128, cache.columns)
        step.reserve(n_rows, n_columns, like)
        self._changed()

    def _look(self) -> None:
        """Sees to it that no captured step outlives what it is true of, and that hooks of others are heard."""
        self._since_look += 1
        if self._seen == changes() and self._since_look < _LOOK:
            return
        assert self._step is not None
        self._leave_model()
        self._calls.detach()
        self._steering.detach()
        model, applied = self._adapter.hf_model, self._adapter.kept.applied
        plan = tuple(i for one in applied for i in one.interventions)
        named = hooks_on(model).difference(*(one.hooks for one in applied)) | hooks_on_all()
        # Compiled code holds the plans' edits itself.
        watched = bool(named) or any(i.mask is not None for i in plan) or (bool(plan) and is_compiled(model))
        if (watched, plan) != (self._watched, self._plan):
            self._watched, self._plan = watched, plan
            self._changed()
        if self._step.graphs.supported:
            inside = frozenset().union(*(one.hooks for one in applied if not one.interventions))
            now = state_of(model), backends.active(), autocast_on(self._adapter.device), inside
            if self._step.model_state != now:
                self._step.graphs.clear()
                self._step.model_state = now
        self._seen, self._since_look = changes(), 0

    def _steers(self, row: Row) -> tuple[Steer, ...]:
        """What edits a row inside the step: applied plans, then its own edits."""
        if self._watched:  # the plans' hooks do theirs
            return row.steering
        planned = (
            Steer(i.layer, i.edit, i.tokens, i.varying)
            for i in self._plan
            if i.rows is None or (row.prompt is not None and row.prompt[0] in i.rows)
        )
        return (*planned, *row.steering)

    def _run(self, step: StaticStep, n: int, columns: int) -> Tensor:
        graphs, spans = step.graphs, self._spans or ()
        if self._watched or not step.steering.is_static or not graphs.supported:
            return self._run_by_host(step, n, columns)
        wanted = self._steering.foreseen(spans)
        rows, active = min(bucket(n), step.cache.rows), step.steering.active
        key = rows, columns, active, wanted
        if wanted is None or not graphs.takes(key):
            return self._run_by_host(step, n, columns)
        served = graphs.serving(key)
        lengths = step.lengths.clone() if wanted or served is None else step.lengths

        def undo() -> None:
            step.lengths.copy_(lengths)

        def once() -> tuple[Tensor, Mapping[Any, Tensor]]:
            with with_plans() if rows == 1 else nullcontext():
                logits = self._forward(step, rows, columns, active, wanted=wanted)
            step.move(rows)
            return logits, self._steering.noted()

        if served is None and not graphs.capture(key, once, undo):
            undo()
            return self._run_by_host(step, n, columns)
        logits, noted = graphs.replay(served or key)
        if not self._steering.tell(spans, wanted, noted):
            undo()  # what is written into the cache again is what the onlookers make of it
            return self._run_by_host(step, n, columns)
        found: Tensor = logits
        return found

    def _run_by_host(self, step: StaticStep, n: int, columns: int) -> Tensor:
        logits = self._forward(step, n, columns, step.steering.active)
        step.move(n)
        return logits

    def _forward(
        self,
        step: StaticStep,
        rows: int,
        columns: int,
        layers: frozenset[int],
        new: int = 1,
        wanted: Hashable | None = None,
    ) -> Tensor:
        """[rows, new, vocabulary] logits of a call over the first slots.

        Args:
            step: what it is over.
            rows, columns: how many slots, and how much of them.
            layers: that may be edited.
            new: tokens of each row.
            wanted: what is noted for the rows' onlookers; None: they look on themselves.
        """
        before = changes()
        self._attach(step, layers)
        if wanted is None:
            self._steering.look_on(self._spans or (), new)
        else:
            self._steering.note_down(wanted)
        ids, positions, back = step.show(rows, columns, new)
        stated = Positions(positions, _OURS)
        if self._watched and self._numbers is not None:
            stated = self._numbers.stated(positions)
        mask = sight_mask(back, self._masks, self._window, self._adapter.dtype)
        inputs = StepInputs(ids, mask, positions, stated)
        self._running = True
        try:
            silent = nullcontext() if self._watched else taken_over()
            with grouped_attention(self._adapter.hf_model), silent:
                return self._calls(inputs, {self._name: step.cache}, new)[0]
        finally:
            self._running = False
            self._steering.rest()
            if self._seen is not None:  # the step's own hooks are no reason to look at the model anew
                self._seen += changes() - before

    def _attach(self, step: StaticStep, layers: frozenset[int]) -> None:
        if layers == self._hooked:
            return
        self._leave_model()
        self._steering.detach()  # whoever looks on sees what the edits make

        def hook(layer: int) -> Any:
            return lambda hidden: step.steering.edit(layer, hidden) if self._running else None

        self._handles.add(attach(self._adapter, [(layer, hook(layer)) for layer in sorted(layers)]))
        self._hooked = layers

    def _leave_model(self) -> None:
        self._handles.remove()
        self._hooked = frozenset()

    def _changed(self) -> None:
        self._spans = None


def _bytes_of(cache: Any) -> int:
    """Memory of one column of one row."""
    if cache is None:
        return 0
    states = [kept for layer in cache.layers if layer.is_initialized for kept in (layer.keys, layer.values)]
    return sum(kept.shape[1] * kept.shape[3] * kept.element_size() for kept in states if kept.ndim == 4)
