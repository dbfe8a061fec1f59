"""Steps over tensors that stay where they are: on a GPU captured once as a CUDA graph, and replayed.

Rows have slots, the first ones of as many as there is room for. What changes from step to step (tokens, lengths, who is
steered how) is copied into the tensors that the graph reads; one is captured for each number of rows and of columns, of
a few that hold any others.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ..attaching import changes, hooks_on
from ..attention_plans import with_plans
from ..hooks import Intervention, attach, taken_over
from ..memory import total_bytes
from ..models.adapter import Handles, ModelAdapter
from ..positions import Positions
from ..regimes import first_change
from ..selfcheck import TREES, packing_form, window_of
from .cache import Unmergeable
from .calls import Calls, Kept, StepInputs
from .graphs import Graphs, state_of
from .grouped import grouped_attention
from .reading import Numbers, Reading
from .request import Steer
from .row import Row
from .slot_steering import SlotSteering
from .slots import SlotCache
from .steering import RowSteering, Span

__all__ = ["StaticBatch", "StaticStep", "bucket"]

_FEWEST_COLUMNS = 128
_FEWEST_ROWS = 8
_FORESEEN = 512  # columns that rows which may grow so long are given at once
_AMPLE_SHARE = 32  # of the device's memory that more room than needed may take
_LOOK = 32  # steps after which the model is looked at anew for what others did to it
_IDLE_SHARE = 8  # of the device's memory that may be held between uses
_OURS = "a captured step is seen by no hook, and asks for no positions"


def bucket(n: int, fewest: int = 1) -> int:
    """The smallest of 1, 2, 4, 8, 16, 24, 32, 48, 64, 96, … that is at least ``n`` and ``fewest``."""
    n = max(n, fewest)
    power = 1 << (n - 1).bit_length()
    return power * 3 // 4 if power > 16 and n <= power * 3 // 4 else power


class StaticStep:
    """The tensors that a step is over. It holds nothing of the model, and outlives decoders.

    A row may bring several columns, say the tokens of a draft, or alternatives at one position.

    Args:
        cache: without rows.
        steering: of the rows.
        device: of the model.
        most_new: columns that a row may bring.

    Attributes:
        ids: [rows, most_new] int64 new tokens.
        lengths: [rows] int64 tokens of each row before them.
        moves: [rows] int64, how much longer a step makes a row: 0 for slots that only fill up the bucket.
        offsets: [rows, most_new] int64, positions of the new columns, counted from the row's length; 0, 1, 2, …
        own: [rows, most_new, most_new] bool, which of the row's new columns (last axis) each of them sees; those up to
            itself.
    """

    def __init__(
        self, cache: SlotCache, steering: SlotSteering, device: torch.device, most_new: int = 1
    ) -> None:
        self.cache, self.steering, self.most_new = cache, steering, most_new
        self.graphs = Graphs(device)
        self.model_state: Hashable = None
        """What of the model the captured steps depend on."""
        self._device = device
        self.reserve(0, 0)

    @property
    def n_bytes(self) -> int:
        """Memory that it takes."""
        return self.cache.n_bytes + self.steering.n_bytes

    def reserve(self, rows: int, columns: int, like: Any = None) -> None:
        """Makes room for this many rows of this many columns.

        Args:
            rows, columns: at least as many as there are.
            like: a cache of the model, the first time.
        """
        self.graphs.clear()
        if rows:
            self.cache.reserve(rows, columns, like)
        new, device = self.most_new, self._device
        self.ids = torch.zeros(rows, new, dtype=torch.long, device=device)
        self._state = torch.zeros(2, rows, dtype=torch.long, device=device)
        self.lengths, self.moves = self._state[0], self._state[1]
        self.offsets = torch.arange(new, device=device).repeat(rows, 1)
        self.own = torch.ones(new, new, dtype=torch.bool, device=device).tril().repeat(rows, 1, 1)

    def lay_out(self, lengths: Sequence[int]) -> None:
        """Says how many tokens the rows have before the step."""
        state = torch.zeros(self._state.shape, dtype=torch.long)
        state[0, : len(lengths)], state[1, : len(lengths)] = torch.tensor(lengths), 1
        # Only CUDA is known to keep pinned memory until its copy is done.
        on_gpu = self._state.is_cuda
        self._state.copy_(state.pin_memory() if on_gpu else state, non_blocking=on_gpu)

    def show(self, rows: int, columns: int, new: int = 1) -> tuple[Tensor, Tensor, Tensor]:
        """Readies the cache for a call over some of the slots and columns.

        Returns:
            The call's ids and positions [rows, new] int64, and [rows, new, columns] int64, how many positions before
            each of its tokens another one stands that it sees; negative for one that it doesn't see.
        """
        lengths = self.lengths[:rows, None]
        index = lengths + torch.arange(new, device=lengths.device)
        positions = lengths + self.offsets[:rows, :new]
        self.cache.show(rows, columns, index)
        column = torch.arange(columns, device=lengths.device).expand(rows, columns)
        if new == 1:
            return self.ids[:rows, :1], positions, (positions - column)[:, None]
        place = column - lengths
        among = place.clamp(0, new - 1)
        # A new column stands where its offset says, an old one at its own index.
        at = torch.where(place >= 0, positions.gather(1, among), column)
        seen = self.own[:rows, :new, :new].gather(2, among[:, None].expand(rows, new, columns))
        seen = torch.where((place >= 0)[:, None], seen & (place < new)[:, None], True)
        back = positions[:, :, None] - at[:, None]
        return self.ids[:rows, :new], positions, torch.where(seen, back, -1)

    def move(self, rows: int) -> None:
        """Says that each row has its new token."""
        self.lengths[:rows] += self.moves[:rows]


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
        self._captures = Graphs.possible(adapter.device)
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
        window = window_of(adapter)
        self._window = window
        self._masks = packing_form(adapter, (window or 0) + 1)
        if self._masks not in TREES:
            raise Unmergeable(f"{adapter.model_id} takes no mask that says which token sees which.")
        if first_change(adapter) is not None:
            raise Unmergeable(f"{adapter.model_id} computes otherwise from some length of its texts on.")
        self.columns = 0
        self.kept: Kept | None = None

    @property
    def captures(self) -> int:
        """How many steps were captured so far."""
        return 0 if self._step is None else self._step.graphs.captures

    def admit(self, rows: Sequence[Row], reading: Reading, places: Sequence[int]) -> None:
        """Adds rows that were read."""
        assert reading.kept is not None
        ((self._name, source),) = reading.kept.items()
        step = self._taken(source)
        lengths = [row.length for row in rows]
        longest = max(*lengths, self.columns)
        last = max(longest, *(row.final_length for row in rows))
        self._reserve(step, step.cache.n + len(rows), min(last, max(2 * longest, _FORESEEN)) + 1, source)
        step.cache.admit(source, places, lengths)
        self.columns = longest
        self._changed()

    def step(self, rows: Sequence[Row], unread: Tensor | None, latest: Tensor | None) -> Tensor:
        """[rows, vocabulary] logits of each row's next token."""
        step, n = self._step, len(rows)
        assert step is not None
        self._look()
        self._reserve(step, n, self.columns + 1)
        replaced = step.steering.replaced
        if self._spans is None:
            ahead = int(unread is not None)
            lengths = [row.length + ahead for row in rows]
            step.lay_out(lengths)
            ids = torch.tensor([row.chosen[-1] for row in rows]) if unread is None else unread
            step.ids[:n, 0] = ids.to(step.ids.device, non_blocking=True)
            self._numbers = Numbers(rows, step.ids.device)
            self._spans = [
                Span(self._steers(row), len(row.ids), length)
                for row, length in zip(rows, lengths, strict=True)
            ]
            step.steering.prepare(self._spans, step.cache.rows)
        else:
            assert latest is not None
            step.ids[:n, 0] = latest
            for span in self._spans:
                span.first += 1
            if any(steer.tokens is not None for span in self._spans for steer in span.steering):
                step.steering.prepare(self._spans, step.cache.rows)
        if step.steering.replaced != replaced:
            step.graphs.clear()
        columns = bucket(self.columns + 1, _FEWEST_COLUMNS)
        logits = self._run(step, n, min(columns, step.cache.columns))
        self.columns += 1
        return logits[:n, -1]

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

    def _reserve(self, step: StaticStep, rows: int, columns: int, like: Any = None) -> None:
        cache = step.cache
        if rows <= cache.rows and columns <= cache.columns:
            return
        columns = max(bucket(columns, _FEWEST_COLUMNS), cache.columns)
        n_rows = max(bucket(rows), cache.rows)
        # Moving to a larger place voids what was captured: a small one takes more room than it needs now.
        ample = max(bucket(rows), 2 * cache.rows if rows > cache.rows else cache.rows, _FEWEST_ROWS)
        each = cache.column_bytes or _bytes_of(like)
        if each * ample * columns <= total_bytes(self._adapter.device) // _AMPLE_SHARE:
            n_rows = ample
        step.reserve(n_rows, columns, like)
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
        named = hooks_on(model).difference(*(one.hooks for one in applied))
        watched = bool(named) or any(i.mask is not None for i in plan)
        if (watched, plan) != (self._watched, self._plan):
            self._watched, self._plan = watched, plan
            self._changed()
        if self._captures:
            now = state_of(model)
            if self._step.model_state != now:
                self._step.graphs.clear()
                self._step.model_state = now
        self._seen, self._since_look = changes(), 0

    def _steers(self, row: Row) -> tuple[Steer, ...]:
        """What edits a row inside the step: applied plans, then its own edits."""
        if self._watched:  # the plans' hooks do theirs
            return row.request.steering
        planned = (
            Steer(i.layer, i.edit, i.tokens)
            for i in self._plan
            if i.rows is None or (row.prompt is not None and row.prompt[0] in i.rows)
        )
        return (*planned, *row.request.steering)

    def _run(self, step: StaticStep, n: int, columns: int) -> Tensor:
        graphs = step.graphs
        if not self._captures or self._watched or graphs.failure or not step.steering.is_static:
            logits = self._forward(step, n, columns, step.steering.active)
            step.move(n)
            return logits
        rows, active = min(bucket(n), step.cache.rows), step.steering.active
        key = rows, columns, active
        if (served := graphs.serving(key)) is not None:
            return graphs.replay(served)
        lengths = step.lengths.clone()

        def once() -> Tensor:
            with with_plans() if rows == 1 else nullcontext():
                logits = self._forward(step, rows, columns, active)
            step.move(rows)
            return logits

        if graphs.capture(key, once, lambda: step.lengths.copy_(lengths)):
            return graphs.replay(key)
        step.lengths.copy_(lengths)
        return self._run(step, n, columns)

    def _forward(
        self, step: StaticStep, rows: int, columns: int, layers: frozenset[int], new: int = 1
    ) -> Tensor:
        """[rows, new, vocabulary] logits of a call over the first slots."""
        self._attach(step, layers)
        ids, positions, back = step.show(rows, columns, new)
        stated = Positions(positions, _OURS)
        if self._watched and self._numbers is not None:
            stated = self._numbers.stated(positions)
        inputs = StepInputs(ids, self._mask(back), positions, stated)
        self._running = True
        try:
            silent = nullcontext() if self._watched else taken_over()
            with grouped_attention(self._adapter.hf_model), silent:
                return self._calls(inputs, {self._name: step.cache}, new)[0]
        finally:
            self._running = False

    def _mask(self, back: Tensor) -> Tensor | dict[str, Tensor]:
        """What the model takes as its mask, from how far back each token stands that is seen."""
        dtype = self._adapter.dtype
        lowest = torch.finfo(dtype).min
        hidden = back[:, None] < 0
        shape = hidden.shape

        def mask(hidden: Tensor) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=back.device).masked_fill_(hidden, lowest)

        if self._masks == "plain":
            return mask(hidden)
        narrow = mask(hidden | (back[:, None] >= self._window)) if self._window is not None else mask(hidden)
        return (
            narrow
            if self._masks == "window"
            else {"full_attention": mask(hidden), "sliding_attention": narrow}
        )

    def _attach(self, step: StaticStep, layers: frozenset[int]) -> None:
        if layers == self._hooked:
            return
        self._leave_model()

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
