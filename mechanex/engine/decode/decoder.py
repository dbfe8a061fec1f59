"""The one loop that makes text: prompts are read and join the batch, each step gives every row a token, rows leave."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..._private.torch import writes
from ...errors import MechanexError, ValidationError
from ..attaching import hooks_on, hooks_on_all
from ..capabilities.caches import reads_again
from ..models.adapter import ModelAdapter
from ..regimes import first_change
from .batch import Batch, CalledBatch
from .calls import TOGETHER, CallForm, Calls
from .choose import Choice, Chooser, are_sound, logprobs_of, not_finite
from .prefixes import Prefixes
from .reading import Reading
from .request import Step, TokenLogprob
from .row import Row
from .static import StaticBatch
from .steering import RowSteering

__all__ = ["Decoder", "Outcome"]

Outcome = tuple[Row, "Step | MechanexError | None"]
"""A row and what came of a step: something to tell, an error that ends it, or nothing yet."""

_log = logging.getLogger(__name__)
_LOGITS = 2**25  # most numbers in the logits of one pass over a prompt whose log-probabilities are asked for


class Decoder:
    """Rows that are decoded together.

    Args:
        adapter: the model; it has to be in eval mode, without gradients, and nobody else's while a method runs.
        padding: a token id to fill rows with; it is never looked at.
        form: how the model takes its calls (``probe.form``); but for "rolling" and "static" there is one row at a time,
            and its prompt is read in one pass.
        prefill_tokens: most tokens of one pass over a single long prompt.
        overlapped: whether the host reads a step's tokens while the next step runs; None for where that helps.
        prefixes: where texts are kept that others may begin with, and looked for; None for nowhere.
        chooser: makes what chooses for some rows on a device, given their unread tokens [rows] or None.
        steering: edits the calls; None for what requests ask for alone.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        padding: int,
        *,
        form: CallForm,
        prefill_tokens: int = 4096,
        overlapped: bool | None = None,
        prefixes: Prefixes | None = None,
        chooser: Callable[[Sequence[Row], torch.device, Tensor | None], Callable[[Tensor], Choice]] = Chooser,
        steering: RowSteering | None = None,
    ) -> None:
        self.steering = RowSteering(adapter) if steering is None else steering
        self.rows: list[Row] = []
        self.form = form
        self._adapter, self._padding, self._prefill_tokens = adapter, padding, prefill_tokens
        overlaps = adapter.device.type == "cuda" if overlapped is None else overlapped
        self._overlapped = overlaps and form != "reread"
        turn = first_change(adapter.hf_model) if form != "reread" else None
        # The longest text whose keys are of no use to a longer one, in models that then read all of it anew.
        self._turn = turn if turn is not None and reads_again(adapter, turn + 1) else None
        # Where a text's length changes its keys, a longer one has no use for them.
        self._prefixes = prefixes if form in TOGETHER and first_change(adapter.hf_model) is None else None
        self._new_chooser = chooser
        self._calls = Calls(adapter, form)
        self._batch: Batch
        if form == "static":
            self._batch = StaticBatch(adapter, self._calls, self.steering)
        else:
            self._batch = CalledBatch(adapter, form, self._calls, self.steering)
        # Both are of the present rows, and made anew when those change.
        self._chooser: Callable[[Tensor], Choice] | None = None
        self._latest: Choice | None = None
        self._pending: Choice | None = None  # of a step that ran, not read yet
        self._hooks: frozenset[int] = frozenset()  # of others, as they were when ours were last away

    @property
    def columns(self) -> int:
        """Columns of the cache: the length of the longest row."""
        return self._batch.columns

    @property
    def prefixes(self) -> Prefixes | None:
        """Where texts are kept that others may begin with; None where none are."""
        return self._prefixes

    @property
    def token_bytes(self) -> int | None:
        """Memory that a token takes in the cache; None where that is empty or of a kind of its own."""
        kept = (self._batch.kept or {}).values() if self.form in TOGETHER else ()
        return sum(cache.column_bytes for cache in kept) or None

    def unfit(self, row: Row) -> MechanexError | None:
        """Why a row can't be decoded with this model, if it can't; others don't suffer by it then."""
        try:
            self._adapter.check_token_ids(row.ids)
            self.steering.check(row.request.steering)
        except MechanexError as error:
            return error
        except (RuntimeError, TypeError, ValueError) as error:  # edits that don't go together, say
            return ValidationError(f"the steering of this request can't be used: {error}")
        return None

    def read(self, rows: Sequence[Row]) -> Reading:
        """Prompts to be read together, by ``advance``; one alone, for any number of rows, if it is long or its
        log-probabilities are wanted."""
        if self._prefixes is not None:
            self._prefixes.made_under(self._alters())
            for row in rows:
                row.read_under = self._prefixes.under
        return Reading(rows, self._padding, self._adapter.device, self._prefixes)

    def advance(self, reading: Reading) -> bool:
        """Makes one pass over the prompts; whether they are read to the end now."""
        begin, end = reading.done, reading.columns
        whole = reading.wants_logprobs
        if len(reading.prompts) == 1 and self.form in TOGETHER:
            most = self._prefill_tokens
            if whole:
                most = max(1, min(most, _LOGITS // max(int(self._adapter.config.vocab_size), 1)))
            end = min(end, begin + most)
        self.steering.prepare(reading.spans(), end - begin)
        logits = self._call(reading, end, end - begin if whole else 1)
        if whole:
            reading.sound &= are_sound(logits[0])
            self._note_prompt(reading.rows, logits[0], begin)
        reading.done, reading.logits = end, logits[:, -1]
        return end == reading.columns and not reading.decide()

    def _call(self, reading: Reading, end: int, last: int) -> Tensor:
        try:
            # After the edits' hooks, so that what those make is seen.
            with reading.evidence.gathered(self._adapter, reading.places_until(end)):
                logits, reading.kept = self._calls(reading.inputs(end), reading.kept, last)
        finally:
            self.steering.rest()
        return logits

    def join(self, reading: Reading) -> list[Outcome]:
        """Chooses the first token of each prompt that was read; those that go on join the batch."""
        assert reading.logits is not None
        outcomes = self.catch_up()
        if not reading.sound:
            return [*outcomes, *((row, not_finite(row)) for row in reading.rows)]
        empty = [i for i, row in enumerate(reading.rows) if row.max_tokens < 1]
        outcomes += [(reading.rows[i], reading.rows[i].finish_unread()) for i in empty]
        wanted = [i for i in range(len(reading.rows)) if i not in empty]
        chosen: list[Outcome] = []
        if wanted:
            rows, places = [reading.rows[i] for i in wanted], [reading.places[i] for i in wanted]
            logits = reading.logits
            if places != list(range(logits.shape[0])):
                logits = logits[torch.tensor(places, device=logits.device)]
            chosen = self._settle(self._new_chooser(rows, logits.device, None)(logits))
        going = {id(row) for row, news in chosen if not _has_ended(row, news)}
        stay = [i for i, row in enumerate(reading.rows) if id(row) in going]
        if stay:
            self._admit(reading, stay)
        return outcomes + chosen

    def _admit(self, reading: Reading, stay: Sequence[int]) -> None:
        rows, places = [reading.rows[i] for i in stay], [reading.places[i] for i in stay]
        self._batch.admit(rows, reading, places)
        self.rows += rows
        self._changed()

    def step(self) -> list[Outcome]:
        """Gives every row a token; finished ones leave.

        Where steps overlap, the next one runs already while this one's tokens are read.
        """
        if self._pending is None:
            self._pending = self._launch()
        choice = self._pending
        # A row that is sure to end with this token needs no further one.
        further = self._overlapped and any(len(row.chosen) + 1 < row.max_tokens for row in self.rows)
        # Onlookers have to see a token before they are asked whether it was the last.
        further &= all(row.request.onlooker is None for row in self.rows)
        # What a grammar allows next hangs on the token before.
        further &= all(row.following is None for row in self.rows)
        if self._turn is not None:
            further &= all(row.n_known != self._turn for row in self.rows)
        self._pending = self._launch() if further else None
        return self._settle_and_take_out(choice)

    def _launch(self) -> Choice:
        """Runs a step of all rows and chooses from it, without waiting for the device."""
        device, unread = self._adapter.device, None if self._pending is None else self._pending.tokens
        if self._chooser is None:
            self._chooser = self._new_chooser(self.rows, device, unread)
        if self.form == "reread":
            self._latest = self._chooser(self._reread())
            return self._latest
        latest = None if self._latest is None else self._latest.tokens
        self._latest = self._chooser(self._batch.step(self.rows, unread, latest))
        return self._latest

    def _reread(self) -> Tensor:
        """[1, vocabulary] logits of the only row, read from its begin."""
        reading = self.read(self.rows)
        self.advance(reading)
        self._batch.columns = reading.columns
        assert reading.logits is not None
        return reading.logits

    def catch_up(self) -> list[Outcome]:
        """What a step that ran ahead has chosen, told as by ``step``; needed before rows are dropped."""
        choice, self._pending = self._pending, None
        return [] if choice is None else self._settle_and_take_out(choice)

    def outgrown(self) -> list[Row]:
        """Rows that have to leave and be read anew, since a longer text turns its keys in another way."""
        return [row for row in self.rows if row.n_known - 1 == self._turn]

    @property
    def _attached(self) -> bool:
        return self.steering.attached or self._calls.attached

    def _alters(self) -> tuple[object, ...]:
        """What may change what the model makes of a text: hooks of others, applied plans, numbers of those and of
        weights. While hooks of ours are there too, those of others count as they were before."""
        model = self._adapter
        if not self._attached:
            self._hooks = hooks_on(model.hf_model) | hooks_on_all()
        plans = tuple(
            (one.hooks, *(i.edit.versions() for i in one.interventions)) for one in model.kept.applied
        )
        return self._hooks, plans, sum(writes(p) for p in model.hf_model.parameters())

    def drop(self, rows: Sequence[Row]) -> None:
        """Takes rows out of the batch, after ``catch_up``."""
        assert self._pending is None
        self._take_out(rows)

    def detach(self) -> None:
        """Leaves the model without hooks; they come back with the next call."""
        self.steering.detach()
        self._batch.detach()
        self._calls.detach()

    def close(self) -> None:
        """Ends with whatever rows there are; leaves the model without hooks."""
        self._pending, self.rows = None, []
        self._batch.clear()
        self._changed()
        self.detach()

    def _settle_and_take_out(self, choice: Choice) -> list[Outcome]:
        outcomes = self._settle(choice)
        if self._prefixes is not None:
            for row, news in outcomes:
                altered = row.request.onlooker is not None and row.request.onlooker.altered
                sound = not isinstance(news, MechanexError) and row.read_under == self._prefixes.under
                if _has_ended(row, news) and sound and not altered:
                    self._keep(row, self._prefixes)
        self._take_out([row for row, news in outcomes if _has_ended(row, news)])
        return outcomes

    def _keep(self, row: Row, prefixes: Prefixes) -> None:
        """Keeps what was read of a row that has ended well, for texts that go on from there."""
        place = next(i for i, one in enumerate(self.rows) if one is row)
        n = row.length + (self._pending is not None)
        assert self._batch.kept is not None
        prefixes.keep(row, n, self._batch.kept, place)

    def _settle(self, choice: Choice) -> list[Outcome]:
        """Gives the rows their tokens; one whose token can't be used ends alone."""
        outcomes: list[Outcome] = []
        for row, found in zip(choice.rows, choice.read(), strict=True):
            if isinstance(found, MechanexError):
                outcomes.append((row, found))
                continue
            try:
                outcomes.append((row, row.take(*found)))
            except MechanexError as error:
                outcomes.append((row, error))
            except Exception as error:  # a tokenizer's own code may raise anything
                _log.error("token %d can't be decoded", found[0], exc_info=error)
                text = f"the tokenizer can't decode token {found[0]}: {type(error).__name__}."
                outcomes.append((row, MechanexError(text, 500)))
        return outcomes

    def _take_out(self, rows: Sequence[Row]) -> None:
        leaving = {id(row) for row in rows}
        if not leaving.intersection(map(id, self.rows)):
            return
        self._changed()
        if all(id(row) in leaving for row in self.rows):
            self.rows, self._pending = [], None
            self._batch.clear()
            return
        order = list(range(len(self.rows)))
        for i in reversed(range(len(self.rows))):
            if id(self.rows[i]) in leaving:
                self._batch.leave(i)
                self.rows[i], order[i] = self.rows[-1], order[-1]
                self.rows.pop()
                order.pop()
        if self._pending is not None:
            self._pending = self._pending.among(order)
        self._batch.trim(max(row.length for row in self.rows) + (self._pending is not None))

    def _changed(self) -> None:
        self._chooser = self._latest = None

    def _note_prompt(self, rows: Sequence[Row], logits: Tensor, begin: int) -> None:
        """Keeps the log-probabilities of the rows' one prompt that ``logits`` [n, vocabulary] predict."""
        found: list[TokenLogprob | None] = [None] if begin == 0 else []
        following = rows[0].ids[begin + 1 : begin + 1 + logits.shape[0]]
        if following:
            most = [rows[0].request.logprobs or 0] * len(following)
            found += logprobs_of(logits[: len(following)], following, most)
        for row in rows:
            row.prompt_logprobs += found


def _has_ended(row: Row, news: Step | MechanexError | None) -> bool:
    return row.result is not None or isinstance(news, MechanexError)
