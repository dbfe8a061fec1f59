"""Whether a model's rows may be put together, found by trying it: a rolling batch against each prompt alone."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from ..engine.models.adapter import ModelAdapter, undisturbed
from ..engine.selfcheck import TOLERANCE, window_of
from ..errors import MechanexError
from .batch import Batch, Outcome
from .request import Generation, Request
from .row import Row

__all__ = ["rolls"]

_log = logging.getLogger(__name__)
_NEW_TOKENS = 5
_LARGEST_WINDOW = 512  # a larger attention window isn't crossed: its probe would take long


def rolls(adapter: ModelAdapter) -> bool:
    """Whether prompts may join and leave a decoding batch of this model; checked once per model.

    Args:
        adapter: the model, nobody else's meanwhile.
    """
    if "rolling" not in adapter.findings:
        try:
            with torch.no_grad(), undisturbed(adapter.hf_model):
                found = _try(adapter)
        except Exception as error:  # a model's own code may raise anything
            _log.debug("%s can't be decoded in a rolling batch: %s", adapter.model_id, error)
            found = False
        if not found:
            _log.warning(
                "%s answers one request at a time: the rows of its cache can't be put together.",
                adapter.model_id,
            )
        adapter.findings["rolling"] = found
    return bool(adapter.findings["rolling"])


class _Mute:
    def decode(self, *_: Any, **__: Any) -> str:
        return ""


class _Checked(Batch):
    """Takes the tokens that each prompt alone had, and compares the logits on the way."""

    truths: dict[int, tuple[Tensor, list[int]]]
    agrees = True

    def _choose(self, rows: Any, logits: Tensor) -> list[Outcome]:
        outcomes: list[Outcome] = []
        for row, ours in zip(rows, logits, strict=True):
            theirs, tokens = self.truths[id(row)]
            step = len(row.chosen)
            reference = theirs[step].double()
            off = (ours.double() - reference).norm() / reference.norm().clamp_min(1e-12)
            self.agrees &= bool(off <= TOLERANCE.get(self._adapter.dtype, 1e-4))
            outcomes.append((row, row.take(tokens[step], None)))
        return outcomes


def _try(adapter: ModelAdapter) -> bool:
    window = window_of(adapter)
    beyond = window if window is not None and window <= _LARGEST_WINDOW else 0
    room = getattr(adapter.config, "max_position_embeddings", None)
    lengths = [11 + beyond, 4, 7]
    if isinstance(room, int):
        lengths = [max(1, min(n, room - _NEW_TOKENS)) for n in lengths]
    batch = _Checked(adapter, 0, 4096)
    batch.truths = {}
    first, second, third = (_row(adapter, batch, n, seed) for seed, n in enumerate(lengths))
    try:
        _join(batch, [first, second])
        batch.step()
        _join(batch, [third])
        batch.step()
        batch.drop([first])
        while batch.rows:
            batch.step()
    finally:
        batch.steering.detach()
    return batch.agrees


def _row(adapter: ModelAdapter, batch: _Checked, length: int, seed: int) -> Row:
    vocab = int(adapter.config.vocab_size)
    generator = torch.Generator().manual_seed(seed)
    ids = (torch.randint(vocab - vocab // 4, (length,), generator=generator) + vocab // 8).tolist()
    hf: Any = adapter.hf_model
    inputs = torch.tensor([ids], device=adapter.device)
    alone = hf.generate(
        input_ids=inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=_NEW_TOKENS,
        min_new_tokens=_NEW_TOKENS,
        do_sample=False,
        num_beams=1,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=0,
    )
    if len(alone.logits) != _NEW_TOKENS:
        raise MechanexError(f"generate gave {len(alone.logits)} tokens, not {_NEW_TOKENS}")
    row = Row(Generation(Request(ids, max_tokens=_NEW_TOKENS)), _Mute(), (), None, 0.0)
    batch.truths[id(row)] = (
        torch.stack([step[0] for step in alone.logits]),
        alone.sequences[0, length:].tolist(),
    )
    return row


def _join(batch: Batch, rows: list[Row]) -> None:
    reading = batch.read(rows)
    while not batch.advance(reading):
        pass
    batch.join(reading)
