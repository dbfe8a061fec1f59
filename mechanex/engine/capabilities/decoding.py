"""What a model's cache can do, found by trying it against whole passes: go on from it, and put rows together."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import cast

import torch
from torch import Tensor

from ..._private.torch import without_hooks
from ..decode.calls import TOGETHER, CallForm
from ..decode.choose import Choice
from ..decode.decoder import Decoder
from ..decode.request import TextRequest
from ..decode.row import Row
from ..intervention import widest
from ..limits import window_of
from ..models.adapter import ModelAdapter, undisturbed
from ..positions import given_positions, whole_pass
from .probing import TOLERANCE, drawn_tokens

__all__ = ["form", "rolls", "together", "token_bytes"]

_log = logging.getLogger(__name__)
_NEW_TOKENS = 5
_LARGEST_WINDOW = 512  # a larger attention window isn't crossed: its probe would take long


def form(adapter: ModelAdapter, n_rows: int) -> CallForm:
    """How this model takes its calls; checked once per model for one row, and once for several.

    Args:
        adapter: the model, nobody else's meanwhile.
        n_rows: how many rows there are to be decoded.
    """
    shared = together(adapter) if n_rows > 1 or _is_on_gpu(adapter) else None
    if shared is not None and (n_rows > 1 or shared == "static"):
        return shared
    if "decoding" not in adapter.findings:
        forms: tuple[CallForm, ...] = ("unmasked", "masked")
        found: CallForm = next((one for one in forms if _agrees(adapter, one)), "reread")
        if found == "reread":
            _log.warning(
                "%s has no cache to go on from: it reads its whole text for every token.", adapter.model_id
            )
        adapter.findings["decoding"] = found
    return cast(CallForm, adapter.findings["decoding"])


def together(adapter: ModelAdapter) -> CallForm | None:
    """The form in which prompts may join and leave a decoding batch of this model, if any; checked once per model.

    Args:
        adapter: the model, nobody else's meanwhile.
    """
    if "together" not in adapter.findings:
        forms: tuple[CallForm, ...] = TOGETHER if _is_on_gpu(adapter) else ("rolling",)
        found = adapter.findings["together"] = next((one for one in forms if _agrees(adapter, one)), None)
        if found is None:
            _log.warning(
                "%s decodes one row at a time: the rows of its cache can't be put together.", adapter.model_id
            )
    return cast("CallForm | None", adapter.findings["together"])


def rolls(adapter: ModelAdapter) -> bool:
    """Whether prompts may join and leave a decoding batch of this model."""
    return together(adapter) is not None


def _is_on_gpu(adapter: ModelAdapter) -> bool:
    """Whether all of the model is on one CUDA device, where steps that are captured pay."""
    return all(p.is_cuda and p.device == adapter.device for p in adapter.hf_model.parameters())


def token_bytes(adapter: ModelAdapter) -> int | None:
    """Memory that the keys and values of a token take in a batch; None where rows can't be put together."""
    return cast("int | None", adapter.findings.get("token bytes")) if rolls(adapter) else None


def _agrees(adapter: ModelAdapter, tried: CallForm) -> bool:
    """Whether decoding in this form gives the logits of whole passes."""
    probe = partial(_try_together if tried in TOGETHER else _try_one_row, tried=tried)
    # What others have attached is none of the model's facts, unless it can't do without.
    for without in (without_hooks, nullcontext):
        try:
            with torch.no_grad(), without(adapter.hf_model), undisturbed(adapter.hf_model):
                return probe(adapter)
        except Exception as error:  # a model's own code may raise anything
            _log.debug("%s can't be decoded in the form %r: %s", adapter.model_id, tried, error)
    return False


class _Mute:
    def decode(self, *_: object, **__: object) -> str:
        return ""


class _Checked:
    """Rows with the tokens that they are to have, and the logits that whole passes give for them."""

    def __init__(self, adapter: ModelAdapter, lengths: Sequence[int]) -> None:
        self._adapter = adapter
        self._tokens: dict[int, list[int]] = {}
        self._truths: dict[int, Tensor] = {}
        self.agrees = True
        self.rows = [self._row(length, seed) for seed, length in enumerate(lengths)]

    def _row(self, length: int, seed: int) -> Row:
        vocab = int(self._adapter.config.vocab_size)
        generator = torch.Generator().manual_seed(seed)
        drawn = drawn_tokens(vocab, length + _NEW_TOKENS, generator)
        ids = drawn.tolist()
        inputs = drawn[None].to(self._adapter.device)
        with given_positions(whole_pass(inputs)):
            truth: Tensor = self._adapter.call(input_ids=inputs).logits
        row = Row(TextRequest(ids[:length], max_tokens=_NEW_TOKENS), _Mute(), ())
        self._tokens[id(row)] = ids[length:]
        self._truths[id(row)] = truth[0, length - 1 : -1]
        return row

    def chooser(
        self, rows: Sequence[Row], device: torch.device, unread: Tensor | None
    ) -> Callable[[Tensor], Choice]:
        """Takes the given tokens and compares the logits on the way."""
        rows = list(rows)

        def choose(logits: Tensor) -> Choice:
            tokens = []
            for row, ours in zip(rows, logits, strict=True):
                step = len(row.chosen)
                truth = self._truths[id(row)][step].to(ours.device, widest(ours.device))
                off = (ours.to(truth.dtype) - truth).norm() / truth.norm().clamp_min(1e-12)
                self.agrees &= bool(off <= TOLERANCE.get(self._adapter.dtype, 1e-4))
                tokens.append(self._tokens[id(row)][step])
            return Choice(
                rows, (), torch.tensor(tokens, device=device), torch.ones(len(rows)).bool(), None, {}
            )

        return choose


def _try_one_row(adapter: ModelAdapter, tried: CallForm) -> bool:
    checked = _Checked(adapter, [_fitting(adapter, 7)])
    decoder = Decoder(adapter, 0, form=tried, overlapped=False, chooser=checked.chooser)
    try:
        _join(decoder, checked.rows)
        while decoder.rows:
            decoder.step()
    finally:
        decoder.close()
    return checked.agrees


def _try_together(adapter: ModelAdapter, tried: CallForm) -> bool:
    window = window_of(adapter)
    beyond = window if window is not None and window <= _LARGEST_WINDOW else 0
    checked = _Checked(adapter, [_fitting(adapter, n) for n in (11 + beyond, 4, 7)])
    first, second, third = checked.rows
    decoder = Decoder(adapter, 0, form=tried, overlapped=False, chooser=checked.chooser)
    try:
        _join(decoder, [first, second])
        decoder.step()
        _join(decoder, [third])
        adapter.findings["token bytes"] = decoder.token_bytes
        decoder.step()
        decoder.drop([first])
        while decoder.rows:
            decoder.step()
    finally:
        decoder.close()
    return checked.agrees


def _fitting(adapter: ModelAdapter, length: int) -> int:
    room = adapter.context
    return length if room is None else max(1, min(length, room - _NEW_TOKENS))


def _join(decoder: Decoder, rows: list[Row]) -> None:
    reading = decoder.read(rows)
    while not decoder.advance(reading):
        pass
    decoder.join(reading)
