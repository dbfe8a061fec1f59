"""Whether a model goes on rightly from a text that was read once, and with parts of that text hidden."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import Literal, cast

import torch
from torch import Tensor

from ...errors import MechanexError
from ..continuing import Continuations, TextStates, continuations, read_on
from ..limits import outgrown_length, window_of
from ..models.adapter import ModelAdapter, undisturbed
from ..pack import TREES, build_packs
from ..passes import scored_hidden
from .caches import cache_names
from .probing import close, drawn_tokens

__all__ = ["ContinuingForm", "continuing_form"]

# Masks over what was read, given as one or by kind of layer; "unmasked": it goes on, but nothing can be hidden.
ContinuingForm = Literal["plain", "window", "dict", "unmasked"]

_log = logging.getLogger(__name__)


def continuing_form(adapter: ModelAdapter, longest: int) -> ContinuingForm | None:
    """How this model goes on from the first tokens of a text that was read; None where it doesn't, or not rightly.

    Decided once per model, and once more when a text first outgrows its attention window, or another length at which it
    may change what it does.

    Args:
        adapter: the model, nobody else's meanwhile.
        longest: tokens of the longest text.
    """
    outgrown = outgrown_length(adapter, longest)
    key = f"continuing beyond {outgrown} tokens" if outgrown else "continuing"
    if key not in adapter.findings:
        adapter.findings[key] = _probe(adapter, outgrown or 0)
    return cast("ContinuingForm | None", adapter.findings[key])


def _probe(adapter: ModelAdapter, outgrown: int) -> ContinuingForm | None:
    """Reads a text and more, forgets or hides what is more, and goes on as if it had never been there."""
    vocab = int(adapter.config.vocab_size)
    generator = torch.Generator().manual_seed(0)

    def draw(n: int) -> list[int]:
        ids: list[int] = drawn_tokens(vocab, n, generator).tolist()
        return ids

    text, more = draw(9 + outgrown), draw(4)
    tails = [(draw(2), draw(3)), (draw(3), draw(3))]
    window = window_of(adapter)
    with torch.no_grad(), undisturbed(adapter.hf_model):
        try:
            (name,) = cache_names(adapter)
            whole = [([*text, *before], completion) for before, completion in tails]
            truth = [
                scored_hidden(adapter, build_packs([pair], layout="padded")[0].to(adapter.device))
                for pair in whole
            ]
            states = TextStates(adapter.n_layers)
            read = partial(read_on, adapter, name, prompt_length=len(text) + 2, text_length=len(text) + 6)
            read(states, [*text, *more])
            again = states.first(len(text) - 5)
            for part in (text[-5:-2], text[-2:]):
                read(again, part)
            plain = continuations(len(text), tails[:1])
            if not _agrees(adapter, plain, name, again, truth[:1]):
                return None
        except MechanexError:
            raise
        except Exception as error:  # a model's own code may raise anything
            _log.info("%s doesn't go on from a text that was read once: %s", adapter.model_id, error)
            return None
        away = [(len(text), len(text) + len(more))] * len(tails)
        for form in TREES:
            if form == "window" and (window is None or window > outgrown):
                continue
            pack = continuations(states.n_tokens, tails, away, start=len(text), mask=form)
            try:
                if _agrees(adapter, pack, name, states.first(states.n_tokens), truth):
                    return form
            except MechanexError:
                raise
            except Exception as error:  # as above
                _log.debug(
                    "%s takes no mask of the form %r when it goes on: %s", adapter.model_id, form, error
                )
    return "unmasked"


def _agrees(
    adapter: ModelAdapter, pack: Continuations, name: str, states: TextStates, truth: Sequence[Tensor]
) -> bool:
    found = scored_hidden(adapter, pack.to(adapter.device), **{name: states})
    pair = pack.pair.to(found.device)
    return all(close(found[pair == i], one) for i, one in enumerate(truth))
