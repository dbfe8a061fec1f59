"""Decoding a given set of rows to their ends, for callers that wait for all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from ...errors import MechanexError, ValidationError
from ..capabilities.decoding import form
from ..models.adapter import ModelAdapter, exclusive, undisturbed
from .calls import TOGETHER
from .decoder import Decoder, Outcome
from .guarded import decode_guarded
from .request import Step
from .row import Row
from .steering import RowSteering

__all__ = ["decode"]

_Tell = Callable[["Step | None"], bool] | None
_READ_TOKENS = 16384  # most positions, padding included, of the prompts that one pass reads


def decode(
    adapter: ModelAdapter,
    rows: Sequence[Row],
    padding: int,
    tell: _Tell = None,
    steering: RowSteering | None = None,
) -> None:
    """Continues every row until its ``result`` is there.

    Args:
        adapter: the model; its mode and flags are kept.
        rows: what to continue.
        padding: a token id to fill rows with.
        tell: is given what each step brings of each row, perhaps nothing; True stops where it is.
        steering: as for the decoder.

    Raises:
        MechanexError: the first row that can't be continued: its edits don't fit, its logits aren't finite, …
    """
    with exclusive(adapter), undisturbed(adapter.hf_model), torch.no_grad():
        if any(row.request.guard is not None for row in rows):
            if steering is not None:
                raise ValidationError("a guard doesn't go with watched behaviors: leave one of them out.")
            for group in _groups(rows):
                decode_guarded(adapter, group, padding, tell)
            return
        decoder = Decoder(adapter, padding, form=form(adapter, len(rows)), steering=steering)
        together = decoder.form in TOGETHER
        for row in rows:
            if (error := decoder.unfit(row)) is not None:
                raise error
        try:
            for group in _groups(rows) if together else ([row] for row in rows):
                if not _read(decoder, group, tell):
                    return
                while decoder.rows and not together:
                    if not _step(decoder, tell):
                        return
            while decoder.rows:
                if not _step(decoder, tell):
                    return
        finally:
            decoder.close()


def _read(decoder: Decoder, rows: Sequence[Row], tell: _Tell) -> bool:
    reading = decoder.read(rows)
    while not decoder.advance(reading):
        pass
    return _go_on(decoder.join(reading), tell)


def _step(decoder: Decoder, tell: _Tell) -> bool:
    outgrown = decoder.outgrown()
    if not outgrown:
        return _go_on(decoder.step(), tell)
    going = _go_on(decoder.catch_up(), tell)
    outgrown = [row for row in outgrown if row.result is None]
    decoder.drop(outgrown)
    for row in outgrown:
        row.suspend()
        going = going and _read(decoder, [row], tell)
    return going


def _go_on(outcomes: Sequence[Outcome], tell: _Tell) -> bool:
    going = True
    for _, news in outcomes:
        if isinstance(news, MechanexError):
            raise news
        if tell is not None and tell(news):
            going = False
    return going


def _groups(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Rows that are read in one pass, in order."""
    group: list[Row] = []
    width = 0
    for row in rows:
        width = max(width, row.n_known)
        if group and width * (len(group) + 1) > _READ_TOKENS:
            yield group
            group, width = [], row.n_known
        group.append(row)
    if group:
        yield group
