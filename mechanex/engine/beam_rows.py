"""The rows of a beam search run through a model: batched and cached where that gives what whole passes give."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..errors import MechanexError
from .caches import cached_tokens, returned_caches
from .models.adapter import ModelAdapter
from .positions import Positions, given_positions
from .regimes import each_alone, regimes_of, text_lengths
from .selfcheck import PROBE_TOKENS, close, outgrown_length

__all__ = ["Rows", "rows_for"]

# "together": every prompt in one left-padded batch, with a cache; "apart": a batch and a cache for each prompt;
# "whole": a batch for each prompt, which is run from the start for every token.
Form = Literal["together", "apart", "whole"]
CACHED: tuple[Form, ...] = ("together", "apart")

_log = logging.getLogger(__name__)


class Rows:
    """Prompts with equally many beams each, which grow by one token at a time.

    Args:
        adapter: the model; steering that is applied to it counts, at the positions that each beam would have alone.
        prompts: token ids, none empty; left-padded to one length.
        cached: keep the model's cache and run only what is new, while the model's rotary factors stay as they were for
            what the cache holds. It holds one row per prompt and beam.
        extra: more keyword arguments of every call of the model.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        prompts: Sequence[Sequence[int]],
        *,
        cached: bool,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        self._adapter, self._cached = adapter, cached
        # Padding is never looked at: any token will do.
        ids = [torch.tensor(prompt, device=adapter.device) for prompt in prompts]
        self._ids = pad_sequence(ids, batch_first=True, padding_side="left")
        self._real = pad_sequence([torch.ones_like(i) for i in ids], batch_first=True, padding_side="left")
        self._prompt_lengths = self._real.sum(1, keepdim=True)
        self._n_prompts, self._n_beams = len(prompts), 1
        self._lengths, self._regimes = [len(prompt) for prompt in prompts], list[Hashable]()
        self._cache: dict[str, Any] = {}
        takes = inspect.signature(adapter.hf_model.forward).parameters
        self._takes_positions = "position_ids" in takes
        self._extra = dict(extra or {})
        if "logits_to_keep" in takes:
            self._extra["logits_to_keep"] = 1

    def logits(self) -> Tensor:
        """[prompts, beams, n_vocab] logits of the token that comes next, in the model's dtype."""
        regimes = regimes_of(self._adapter, self._lengths)
        if regimes != self._regimes:
            self._cache, self._regimes = {}, regimes
        ids = self._ids[:, -1:] if self._cache else self._ids
        index = (self._real.cumsum(1) - 1)[:, -ids.shape[1] :]  # -1 for padding
        inputs = self._extra | self._cache | {"input_ids": ids}
        # Recurrent models read the mask of the tokens at hand, which are all real once there is a state.
        if all(cached_tokens(cache) is not None for cache in self._cache.values()):
            inputs["attention_mask"] = self._real
        if self._takes_positions:
            inputs["position_ids"] = index.clamp(min=0)
        places = Positions(index, self._prompt_lengths.expand_as(index))
        lengths = self._real.sum(1, keepdim=True)
        with given_positions(places), text_lengths(lengths), each_alone(self._adapter.hf_model):
            if self._cached:
                out = self._adapter.hf_model(**inputs, use_cache=True, return_dict=True)
                self._cache = returned_caches(out)
            else:
                out = self._adapter.call(**inputs)
        last: Tensor = out.logits[:, -1]
        return last.reshape(self._n_prompts, self._n_beams, -1)

    def extend(self, parents: Tensor, tokens: Tensor) -> None:
        """Replaces the beams of every prompt: new beam i is old beam ``parents[i]`` followed by ``tokens[i]``.

        Args:
            parents: [n] int64, indices of the beams so far; any of them, any number of times.
            tokens: [n] int64 token ids.
        """
        parents, tokens = parents.to(self._ids.device), tokens.to(self._ids.device)
        first = torch.arange(self._n_prompts, device=self._ids.device)[:, None] * self._n_beams
        rows = (first + parents).flatten()
        new = tokens.repeat(self._n_prompts)[:, None]
        self._ids = torch.cat([self._ids[rows], new], 1)
        self._lengths = [n + 1 for n in self._lengths]
        self._real = torch.cat([self._real[rows], torch.ones_like(new)], 1)
        self._prompt_lengths = self._prompt_lengths[rows]
        for cache in self._cache.values():
            cache.reorder_cache(rows)
        self._n_beams = len(parents)


def rows_for(
    adapter: ModelAdapter,
    prompts: Sequence[Sequence[int]],
    n_tokens: int,
    extra: Mapping[str, Any] | None = None,
) -> list[Rows]:
    """Rows for these prompts in the fastest form that is right for the model: one batch, or one per prompt.

    Args:
        adapter: the model.
        prompts: token ids, none empty.
        n_tokens: how many tokens the rows will grow by.
        extra: more keyword arguments of every call of the model; ``use_cache=False`` is heeded.
    """
    extra = dict(extra or {})
    use_cache = extra.pop("use_cache", True)
    form = _form(adapter, max(map(len, prompts)) + n_tokens) if use_cache or use_cache is None else "whole"
    if form == "together":
        return [Rows(adapter, prompts, cached=True, extra=extra)]
    return [Rows(adapter, [prompt], cached=form == "apart", extra=extra) for prompt in prompts]


def _form(adapter: ModelAdapter, longest: int) -> Form:
    """The form found by trying, once per model and once more when a row first outgrows its window or the like."""
    outgrown = outgrown_length(adapter, longest)
    key = f"beam form beyond {outgrown} tokens" if outgrown else "beam form"
    if key not in adapter.findings:
        found = _probe(adapter, outgrown)
        if found is None:
            return "whole"
        adapter.findings[key] = found
    return cast(Form, adapter.findings[key])


def _probe(adapter: ModelAdapter, outgrown: int | None) -> Form | None:
    """Two prompts of unequal length, beams that are copied, dropped and swapped, in each form.

    None where the logits are NaN, which steering that is attached for now may cause.
    """
    generator = torch.Generator().manual_seed(0)
    vocab = int(adapter.config.vocab_size)

    def draw(n: int) -> Tensor:
        return torch.randint(vocab, (n,), generator=generator)

    prompts = [draw(PROBE_TOKENS - 3 + (outgrown or 0)).tolist(), draw(4).tolist()]
    steps = [
        (torch.tensor([0, 0, 0]), draw(3)),
        (torch.tensor([2, 0]), draw(2)),
        (torch.tensor([1, 0]), draw(2)),
    ]

    def run(rows: Rows) -> list[Tensor]:
        seen = [rows.logits()]
        for parents, tokens in steps:
            rows.extend(parents, tokens)
            seen.append(rows.logits())
        return seen

    truth: list[Tensor] | None = None
    for form in CACHED:
        try:
            if truth is None:
                alone = [run(Rows(adapter, [prompt], cached=False)) for prompt in prompts]
                truth = [torch.cat(logits) for logits in zip(*alone, strict=True)]
            if any(bool(logits.isnan().any()) for logits in truth):
                return None
            batches = [prompts] if form == "together" else [[prompt] for prompt in prompts]
            tried = [run(Rows(adapter, batch, cached=True)) for batch in batches]
        except MechanexError:
            raise
        except Exception as error:  # a model's own code may raise anything
            _log.debug("%s does not run beams %s with a cache: %s", adapter.model_id, form, error)
            continue
        if all(_agree(torch.cat(ours), theirs) for *ours, theirs in zip(*tried, truth, strict=True)):
            return form
    _log.info("%s can't reorder its cache; a beam search runs whole sequences.", adapter.model_id)
    return "whole"


def _agree(ours: Tensor, theirs: Tensor) -> bool:
    """Whether logits [prompts, beams, n_vocab] mean the same to rounding: what all of a row share means nothing."""
    barred = theirs == -math.inf
    if not torch.equal(ours == -math.inf, barred):
        return False
    a, b = ours.masked_fill(barred, 0.0), theirs.masked_fill(barred, 0.0)
    return close(a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True))
