"""Decoding under a bound: no token is chosen from a distribution that steering has moved further than a guard allows.

Beside each steered row runs a plain one with the same tokens. A step brings several columns of the newest token, all at
one position, each edited by another share of the strength and seeing the past and itself. The strongest that is within
the bound chooses the next token, and its keys and values stay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...errors import MechanexError, ValidationError
from ..capabilities.decoding import together
from ..capabilities.packing import packing_form
from ..divergence import divergence
from ..hooks import attach
from ..intervention import Edit, EditTable, compute_dtype
from ..limits import window_of
from ..models.adapter import ModelAdapter, ResidualHook
from ..pack import TREES
from ..regimes import first_change
from .cache import Unmergeable
from .calls import Calls, StepInputs
from .choose import Chooser
from .decoder import Decoder
from .grouped import grouped_attention
from .reading import Numbers
from .request import GuardedToken, Steer, Step
from .row import Row
from .slot_steering import SlotSteering
from .slots import SlotCache
from .static_step import StaticStep, sight_mask
from .steering import Span

__all__ = ["SHARES", "decode_guarded"]

SHARES = (1.0, 2 / 3, 1 / 3, 0.0)
"""Of the strength, strongest first, which are tried at every token."""

_Tell = Callable[["Step | None"], bool] | None


def decode_guarded(adapter: ModelAdapter, rows: Sequence[Row], padding: int, tell: _Tell = None) -> None:
    """Continues rows whose requests have a guard until their results are there, and notes what the guard did.

    Args:
        adapter: the model; in eval mode, without gradients, and nobody else's meanwhile.
        rows: what to continue, together.
        padding: a token id to fill rows with.
        tell: is given what each step brings of each row, perhaps nothing; True stops where it is.

    Raises:
        ValidationError: a prompt of one token, or a model that takes no mask that says which token sees which.
        MechanexError: the first row that can't be continued.
    """
    for row in rows:
        if len(row.ids) < 2:
            raise ValidationError("a guard needs a prompt of two tokens or more; this one has one.")
    batch = _GuardedBatch(adapter, rows, padding)
    try:
        while batch.rows:
            for news in batch.step():
                if tell is not None and tell(news):
                    return
    finally:
        batch.calls.detach()


class _Begun(Row):
    """A row of which everything is read but its prompt's last token, plain or steered."""

    def __init__(self, row: Row, steering: tuple[Steer, ...]) -> None:
        self.request, self.prompt, self.ids, self.chosen = row.request, row.prompt, row.ids, []
        self.steering, self.undecided, self.cached_tokens = steering, (), 0
        self.prompt_logprobs = []
        # Nobody else has the same tokens to read.
        self.prompt_key = (id(self),)

    @property
    def known(self) -> list[int]:
        return self.ids[:-1]

    @property
    def n_known(self) -> int:
        return len(self.ids) - 1

    @property
    def wants_prompt_logprobs(self) -> bool:
        return False


class _GuardedBatch:
    """Rows in pairs: slot 2i is steered, slot 2i + 1 is plain, both of row i."""

    def __init__(self, adapter: ModelAdapter, rows: Sequence[Row], padding: int) -> None:
        self._adapter, self.rows = adapter, list(rows)
        self._window = window_of(adapter)
        self._masks = packing_form(adapter, (self._window or 0) + 1)
        if (
            self._masks not in TREES
            or together(adapter) is None
            or first_change(adapter.hf_model) is not None
        ):
            raise self._unfit()
        self.calls = Calls(adapter, "static")
        self._scaled: dict[tuple[int, float], tuple[Edit, Edit]] = {}
        self._tables: dict[int, tuple[list[tuple[Edit, ...]], EditTable]] = {}
        self._decide(padding)
        self._begin(padding)

    def _unfit(self) -> ValidationError:
        return ValidationError(
            f"{self._adapter.model_id} can't be guarded: it takes no mask that says which token sees which, so that "
            "several strengths can't be tried at one token. Leave guard out, or use a smaller strength."
        )

    def _decide(self, padding: int) -> None:
        """Decides conditions, by whole prompts."""
        undecided = [row for row in self.rows if row.undecided]
        if undecided:
            self._read(undecided, padding)

    def _read(self, rows: Sequence[Row], padding: int) -> Any:
        decoder = Decoder(self._adapter, padding, form="rolling")
        try:
            for row in rows:
                decoder.steering.check(row.request.steering)
            reading = decoder.read(rows)
            while not decoder.advance(reading):
                pass
            return reading
        finally:
            decoder.detach()

    def _begin(self, padding: int) -> None:
        adapter, rows = self._adapter, self.rows
        begun = [_Begun(row, steering) for row in rows for steering in (row.steering, ())]
        reading = self._read(begun, padding)
        ((self._name, source),) = reading.kept.items()
        steering = SlotSteering(adapter.d_model, adapter.device, adapter.dtype)
        try:
            self._step = StaticStep(SlotCache(source), steering, adapter.device, len(SHARES))
            columns = max(row.final_length for row in rows) + len(SHARES)
            self._step.reserve(len(begun), columns, source)
        except Unmergeable as error:
            raise self._unfit() from error
        self._step.offsets.zero_()
        self._step.own[:] = torch.eye(len(SHARES), dtype=torch.bool, device=adapter.device)
        self._step.cache.admit(source, reading.places, [one.n_known for one in begun])

    def step(self) -> list[Step | None]:
        """Gives every row a token; those that have ended leave."""
        rows, device = self.rows, self._adapter.device
        # The newest token is not read yet.
        lengths = [row.n_known - 1 for row in rows for _ in range(2)]
        logits = self._logits(lengths)
        logits = logits.to(compute_dtype(logits.dtype))
        steered, plain = logits[0::2], logits[1::2, 0]
        kls = divergence(steered.log_softmax(-1), plain.log_softmax(-1)[:, None])
        bounds = torch.tensor([row.request.guard for row in rows], dtype=kls.dtype, device=kls.device)
        within = kls <= bounds[:, None]
        found = within.any(1)
        share = torch.where(found, within.int().argmax(1), len(SHARES) - 1)
        at = torch.arange(len(rows), device=share.device)
        chosen = torch.where(found[:, None], steered[at, share], plain)
        choice = Chooser(rows, device)(chosen)
        index = torch.tensor(lengths, device=device)
        kept = index.clone()
        kept[0::2] += share.to(device)
        self._step.cache.keep(index, kept)
        told = zip(share.tolist(), kls.tolist(), found.tolist(), strict=True)
        outcomes: list[Step | None] = []
        for row, result, (best, seen, fits) in zip(rows, choice.read(), told, strict=True):
            if isinstance(result, MechanexError):
                raise result
            row.guarded.append(GuardedToken(SHARES[best], seen[best] if fits else 0.0, seen[0], not fits))
            outcomes.append(row.take(*result))
        self._drop_ended()
        return outcomes

    def _drop_ended(self) -> None:
        for i in reversed(range(len(self.rows))):
            if self.rows[i].result is None:
                continue
            # The last slot takes the place of one that is dropped, so that the last pair comes over in its order.
            self._step.cache.drop(2 * i + 1)
            self._step.cache.drop(2 * i)
            self.rows[i] = self.rows[-1]
            self.rows.pop()

    def _logits(self, lengths: Sequence[int]) -> Tensor:
        """[2 · rows, shares, vocabulary] logits behind the newest tokens."""
        step, n, new = self._step, len(lengths), len(SHARES)
        step.lay_out(lengths)
        newest = [(row.chosen or row.ids)[-1] for row in self.rows for _ in range(2)]
        step.ids[:n] = torch.tensor(newest, device=step.ids.device)[:, None]
        ids, positions, back = step.show(n, min(max(lengths) + new, step.cache.columns), new)
        mask = sight_mask(back, self._masks, self._window, self._adapter.dtype)
        stated = Numbers([row for row in self.rows for _ in range(2)], positions.device).stated(positions)
        inputs = StepInputs(ids, mask, positions, stated)
        with attach(self._adapter, self._hooks(lengths)), grouped_attention(self._adapter.hf_model):
            return self.calls(inputs, {self._name: step.cache}, new)[0]

    def _hooks(self, lengths: Sequence[int]) -> list[tuple[int, ResidualHook]]:
        """What edits the steered rows' columns, each by its share."""
        layers = sorted({steer.layer for row in self.rows for steer in row.steering})
        found: list[tuple[int, ResidualHook]] = []
        for layer in layers:
            chains: dict[tuple[Edit, ...], int] = {}
            index = torch.full((len(lengths), len(SHARES)), -1, dtype=torch.int32)
            for i, row in enumerate(self.rows):
                span = Span(row.steering, len(row.ids), lengths[2 * i])
                here = [span.edit(steer, span.first) for steer in row.steering if steer.layer == layer]
                edits = [edit for edit in here if edit is not None]
                for j, share in enumerate(SHARES if edits else ()):
                    if share:
                        chain = tuple(self._at(edit, share) for edit in edits)
                        index[2 * i, j] = chains.setdefault(chain, len(chains))
            if chains:
                found.append((layer, partial(self._table(layer, list(chains)).apply, rows=index)))
        return found

    def _table(self, layer: int, chains: list[tuple[Edit, ...]]) -> EditTable:
        """The table of a layer's chains, made anew where they are others than at the step before."""
        known = self._tables.get(layer)
        if known is None or known[0] != chains:
            known = self._tables[layer] = chains, EditTable.of_chains(chains)
        return known[1]

    def _at(self, edit: Edit, share: float) -> Edit:
        if share == 1:
            return edit
        key = id(edit), share
        if key not in self._scaled:
            self._scaled[key] = edit, edit.scaled(share)  # the edit is kept, so that its id stays its own
        return self._scaled[key][1]
