"""Decoding in two or more processes alike: what the first does and chooses, the others do and take over.

Nothing is decided twice but what the model's own numbers say inside a pass (behaviors that are watched): tokens, ends,
conditions and whose turn it is come from the first process. The others have no tokenizer, grammar, clock or draw.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from ...engine.decode.calls import CallForm
from ...engine.decode.choose import Choice, Found
from ...engine.decode.decoder import Decoder, Outcome
from ...engine.decode.prefixes import Prefixes
from ...engine.decode.reading import Reading
from ...engine.decode.request import Result, Steer, Step, TextRequest, TokenLogprob
from ...engine.decode.row import Row
from ...engine.models.adapter import ModelAdapter
from ...engine.prompt_conditions import PromptCondition
from ...engine.sae.watching import Watch, WatchingSteering
from ...errors import MechanexError

__all__ = ["LeadingDecoder", "LedDecoder", "LedRow", "Parted"]

_GOES_ON, _ENDS, _FAILS = range(3)
_NO_TOKEN = -1  # of a row that ends with the token before


class Parted(BaseException):
    """A process is gone, or does something else than the first: nothing that they compute can be trusted any more.

    No work on the model may take it for a failure of its own, so that it is no ``Exception``.
    """


class LedRow(Row):
    """Another process's side of a row: what the model is given of it, and nothing by which tokens are chosen.

    Args:
        request: the parts of the first process's that change what the model computes.
        chosen: tokens of the answer so far.
        max_tokens: the row's.
    """

    def __init__(self, request: TextRequest, chosen: Sequence[int], max_tokens: int) -> None:
        self.request, self.ids, self.chosen = request, list(request.ids), list(chosen)
        self.max_tokens = max_tokens
        self.steering, self.undecided = (), ()
        self.prompt, self.prompt_key, self.prompt_logprobs = None, (id(self),), []
        self.cached_tokens, self.read_under, self.found_prefix = 0, None, None
        self.following = self.result = None
        self.ends_next = False
        """Whether it ends with the token that it is given next."""
        self.hear: Callable[[str], tuple[Any, ...]]
        self._n_unread = 1

    @classmethod
    def of(cls, row: Row) -> LedRow:
        """That of a row of the first process."""
        asked, watch = row.request, row.request.onlooker
        request = TextRequest(
            array("q", row.ids),
            steering=asked.steering,
            prompt_logprobs=asked.prompt_logprobs,
            owner=asked.owner,
            onlooker=Watch(watch.behaviors, watch.action, watch.floor) if isinstance(watch, Watch) else None,
        )
        return cls(request, array("q", row.chosen), row.max_tokens)

    def __reduce__(self) -> tuple[Any, ...]:
        return LedRow, (self.request, array("q", self.chosen), self.max_tokens)

    def decide(self, met: Collection[PromptCondition]) -> bool:
        (steering,) = self.hear("decided")
        changed = len(steering) > len(self.steering)
        self.steering, self.undecided = steering, ()
        return changed

    def take(self, token: int, logprob: TokenLogprob | None) -> Step | None:
        if token == _NO_TOKEN:
            self._n_unread = 0
        else:
            self.chosen.append(token)
        return self.finish_unread() if self.ends_next else None

    def finish_unread(self) -> Step | None:
        self.result = Result("", "stop", len(self.ids), len(self.chosen))
        return None


class _Teller(Protocol):
    """Who tells the other processes; see :class:`.wire.Lead`."""

    def number(self, thing: object) -> int: ...

    def tell(self, what: str, *args: object) -> None: ...

    def flush(self) -> None: ...

    def failed(self) -> None: ...


class LeadingDecoder(Decoder):
    """The first process's: says what it does before the model runs, and what came of it.

    Args:
        lead: whom it says it to.
        adapter, padding, form, prefill_tokens, prefixes: as of any decoder.
    """

    def __init__(
        self,
        lead: _Teller,
        adapter: ModelAdapter,
        padding: int,
        *,
        form: CallForm,
        prefill_tokens: int,
        prefixes: Prefixes,
    ) -> None:
        super().__init__(
            adapter,
            padding,
            form=form,
            prefill_tokens=prefill_tokens,
            overlapped=False,
            prefixes=prefixes,
            steering=WatchingSteering(adapter),
        )
        self._lead, self._inside = lead, False
        lead.tell("begin", padding, form, prefill_tokens, prefixes.most_bytes)

    def read(self, rows: Sequence[Row]) -> Reading:
        reading = super().read(rows)
        if not self._inside:  # else the others do so too, of themselves
            states = [(row, row.steering, row.undecided, bool(row.prompt_logprobs)) for row in rows]
            found = reading.done, reading.columns, *facts(self)
            self._lead.tell("read", self._lead.number(reading), states, reading.places, found)
        return reading

    def advance(self, reading: Reading) -> bool:
        if self._inside:
            return super().advance(reading)
        asked = reading.evidence.wanted
        with self._telling("advance", self._lead.number(reading), reading.done, *facts(self)):
            ended = super().advance(reading)
        if asked and not reading.evidence.wanted:
            for row in reading.rows:
                self._lead.tell("decided", row.steering)
        return ended

    def join(self, reading: Reading) -> list[Outcome]:
        with self._telling("join", self._lead.number(reading), reading.sound, runs=False):
            return super().join(reading)

    def step(self) -> list[Outcome]:
        with self._telling("step", *facts(self)):
            return super().step()

    def drop(self, rows: Sequence[Row]) -> None:
        super().drop(rows)
        self._lead.tell("drop", list(rows))

    def detach(self) -> None:
        super().detach()
        self._lead.tell("detach")

    def _settle(self, choice: Choice) -> list[Outcome]:
        before = [len(row.chosen) for row in choice.rows]
        outcomes = super()._settle(choice)
        told = array("q")
        for n, (row, news) in zip(before, outcomes, strict=True):
            token = row.chosen[-1] if len(row.chosen) > n else _NO_TOKEN
            ends = _ENDS if row.result is not None else _GOES_ON
            told.extend((token, _FAILS if isinstance(news, MechanexError) else ends))
        self._lead.tell("chosen", told)
        return outcomes

    @contextmanager
    def _telling(self, what: str, *args: object, runs: bool = True) -> Iterator[None]:
        """Runs a block that the others run too; where it fails, they are waited for.

        Args:
            what, args: what they are told before.
            runs: whether it runs the model, for which all are needed.
        """
        self._lead.tell(what, *args)
        if runs:
            self._lead.flush()
        self._inside = True
        try:
            yield
        except Exception:
            self._lead.failed()
            raise
        finally:
            self._inside = False


class LedDecoder(Decoder):
    """Another process's: does as it is told.

    Args:
        hear: gives what the first process says next, which has to be what is named.
        adapter, padding, form, prefill_tokens, prefixes: as of any decoder.
    """

    def __init__(
        self,
        hear: Callable[[str], tuple[Any, ...]],
        adapter: ModelAdapter,
        padding: int,
        *,
        form: CallForm,
        prefill_tokens: int,
        prefixes: Prefixes,
    ) -> None:
        super().__init__(
            adapter,
            padding,
            form=form,
            prefill_tokens=prefill_tokens,
            overlapped=False,
            prefixes=prefixes,
            chooser=self._hearer,
            steering=WatchingSteering(adapter),
        )
        self._hear = hear

    def read_again(
        self,
        states: Iterable[tuple[LedRow, tuple[Steer, ...], tuple[PromptCondition, ...], bool]],
        places: Sequence[int],
    ) -> Reading:
        """What ``read`` of the first process gave, for rows in the state that they have there.

        Args:
            states: rows, the edits that are in force, conditions that aren't decided, whether their prompt's
                log-probabilities are there.
            places: where each row's prompt is among those that are read.
        """
        rows = []
        for place, (row, steering, undecided, noted) in zip(places, states, strict=True):
            row.steering, row.undecided, row.found_prefix = steering, undecided, None
            row.prompt_key, row.prompt_logprobs = (place,), [None] * noted
            row.hear = self._hear
            rows.append(row)
        return self.read(rows)

    def _hearer(
        self, rows: Sequence[Row], device: torch.device, unread: Tensor | None
    ) -> Callable[[Tensor], Choice]:
        return lambda logits: _ToldChoice(rows, device, self._hear)

    def _note_prompt(self, rows: Sequence[Row], logits: Tensor, begin: int) -> None:
        for row in rows:
            row.prompt_logprobs += [None] * logits.shape[0]


class _ToldChoice(Choice):
    """The tokens that the first process has chosen, once they are asked for."""

    def __init__(
        self, rows: Sequence[Row], device: torch.device, hear: Callable[[str], tuple[Any, ...]]
    ) -> None:
        self.rows = list(rows)
        self._device, self._hear = device, hear

    def read(self) -> list[Found | MechanexError]:
        (told,) = self._hear("chosen")
        tokens, ends = told[::2], told[1::2]
        self.tokens = torch.tensor(tokens.tolist(), device=self._device)
        found: list[Found | MechanexError] = []
        for row, token, end in zip(self.rows, tokens, ends, strict=True):
            assert isinstance(row, LedRow)
            row.ends_next = end == _ENDS
            found.append(MechanexError("it has failed.") if end == _FAILS else (token, None))
        return found


def facts(decoder: Decoder) -> tuple[int, ...]:
    """What has to be the same in all processes before they run the model together, in a few numbers."""
    kept = decoder.prefixes
    lengths = sum(row.n_known for row in decoder.rows)
    there = (0, 0) if kept is None else (len(kept), kept.n_bytes)
    return len(decoder.rows), decoder.columns, lengths, *there
