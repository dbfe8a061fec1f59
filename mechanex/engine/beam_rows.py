"""The rows of a beam search run through a model, whole or with its cache."""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .caches import cached_tokens, returned_caches
from .left_padding import left_padded
from .models.adapter import ModelAdapter
from .positions import Positions, given_positions
from .regimes import each_alone, regimes_of, text_lengths

__all__ = ["Rows"]


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
        ids, index = left_padded(prompts)
        self._ids, self._real = ids.to(adapter.device), (index >= 0).long().to(adapter.device)
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
        regimes = regimes_of(self._adapter.hf_model, self._lengths)
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
