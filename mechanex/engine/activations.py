"""The residual stream at chosen tokens of many texts, as arrays in memory or in files."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from ..errors import ValidationError
from .activation_files import Array, Shards, StoredRows, opened
from .forward import packs_for
from .given import as_list
from .models import adapter_for
from .models.adapter import ModelAdapter, exclusive, undisturbed
from .pack import Pack
from .passes import visit_residuals
from .plan_files import plan_digest
from .positions import check_tokens
from .ranks import Ranks, current_ranks, dealt
from .text import Prompt, encode_prompt

__all__ = ["Activations", "activations"]


class Activations(Mapping[int, "Array | StoredRows"]):
    """``{layer: [n, d_model]}``, the chosen tokens of all texts one after another.

    Args:
        arrays: by layer.
        lengths: how many of the rows are each text's.
    """

    def __init__(self, arrays: Mapping[int, Array | StoredRows], lengths: Sequence[int]) -> None:
        self._arrays, self.lengths = dict(arrays), list(lengths)

    def __getitem__(self, layer: int) -> Array | StoredRows:
        return self._arrays[layer]

    def __iter__(self) -> Iterator[int]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def by_text(self, layer: int) -> list[Array]:
        """A layer's rows, text by text."""
        ends = numpy.cumsum(self.lengths).tolist()
        return [self._arrays[layer][end - n : end] for n, end in zip(self.lengths, ends, strict=True)]

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Activations:
        """Opens what ``activations(…, out=folder)`` wrote; the arrays stay in their files.

        Raises:
            NotFoundError: there are none in the folder.
            ValidationError: the call that wrote them was stopped before its end.
        """
        shards = opened(Path(folder))
        return cls(shards.arrays(), shards.lengths)

    def __repr__(self) -> str:
        layers = ", ".join(map(str, self._arrays))
        return f"Activations(layers {layers}: {sum(self.lengths)} tokens of {len(self.lengths)} texts)"


def activations(
    model: nn.Module | ModelAdapter,
    texts: Sequence[Prompt],
    layers: Sequence[int] | None = None,
    tokenizer: Any = None,
    *,
    tokens: str | int | slice = "last",
    out: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Activations:
    """Reads the residual stream entering layers, in packed passes that end at the highest of them.

    Args:
        model: a Hugging Face or TransformerLens model; steering that is applied to it is seen.
        texts: text, token ids or chat messages.
        layers: negatives from the end, n for the stream that leaves the last of n; None for all, n included.
        tokenizer: needed for text when the model carries none.
        tokens: ``"last"``, ``"all"``, a place or a slice in each text, negatives from its end.
        out: a folder for the arrays, which then stay in their files, shards of safetensors: for more than memory holds.
            Where the same call was stopped before its end, it goes on after the shards that are there; what another
            call has written is deleted.
        progress: show a progress bar.

    Returns:
        Arrays in float32 (float64 for float64 models); with ``out``, what numpy takes as arrays.

    Raises:
        ValidationError: no texts, a layer that doesn't exist, a text without the chosen tokens, or one longer than a
            model's table of positions; a model without one reads on past its context, which is logged.
    """
    adapter = adapter_for(model)
    tokenizer = tokenizer if tokenizer is not None else adapter.tokenizer
    ids = [encode_prompt(tokenizer, text) for text in as_list("texts", texts, "texts")]
    indices = list(range(adapter.n_layers + 1)) if layers is None else adapter.layer_indices(layers)
    if not all(ids):
        raise ValidationError(f"text {ids.index([])} has no tokens, and the tokenizer adds no BOS.")
    chosen = [_places(tokens, len(one), i) for i, one in enumerate(ids)]
    # The row of the result that each token of a text goes to, or -1.
    rows, n = [], 0
    for one, places in zip(ids, chosen, strict=True):
        row = torch.full((len(one),), -1)
        row[places] = torch.arange(n, n + len(places))
        rows.append(row)
        n += len(places)
    lengths = [len(places) for places in chosen]
    read = _Reader(adapter, ids, rows, lengths, indices)
    ranks = current_ranks(adapter)
    if out is None:
        with ranks.together():
            memory = read(range(len(ids)), ranks, progress=progress)
        return Activations(memory, lengths)
    dtype = numpy.dtype(read.dtype).name
    shards = Shards.planned(Path(out), indices, adapter.d_model, dtype, lengths, [len(one) for one in ids])
    whole = replace(ranks, split=True)  # of a shard nothing is dealt
    with ranks.together():
        # What tells whether the model, and what others attached to it, are those of a folder to go on in.
        longest = max(range(len(ids)), key=lambda i: len(ids[i]))
        seen = read(range(longest, longest + 1), whole)
    digest = hashlib.sha256(json.dumps([ids, chosen]).encode()).hexdigest()
    facts = {
        "model": adapter.model_id,
        "texts": digest,
        "steering": _steering(adapter),
        "probe": _probe(seen),
    }
    left = ranks.from_first(lambda: shards.begin(facts) if ranks.first else [])
    mine = [left[i] for i in ranks.share([sum(len(ids[j]) for j in shards.texts(shard)) for shard in left])]
    with ranks.together():
        for shard in ranks.each(mine, len(left), "Activations", unit="shard", progress=progress):
            found = read(shards.texts(shard), whole)
            if ranks.first or not ranks.split:
                shards.write(shard, found)
    return Activations(shards.arrays(), lengths)


def _steering(adapter: ModelAdapter) -> str:
    """Tells what is applied to the model from anything else that might be."""
    plan = [one for applied in adapter.kept.applied for one in applied.interventions]
    try:
        return plan_digest(plan) if plan else "none"
    except ValidationError:  # a function, which may do anything the next time
        return uuid.uuid4().hex


def _probe(seen: Mapping[int, Array]) -> list[list[float]]:
    """Of each layer's first rows two numbers: the norm, and the share along a direction."""
    found = []
    for rows in seen.values():
        some = rows[:16].astype(numpy.float64)
        along = some @ numpy.random.default_rng(0).standard_normal(some.shape[1])
        found += numpy.stack([numpy.linalg.norm(some, axis=1), along], axis=1).tolist()
    return found


class _Reader:
    """Reads the chosen tokens of texts.

    Args:
        adapter: the model.
        ids: of each text.
        rows: for each text's tokens the row of the whole result that each goes to, or -1.
        lengths: rows of each text.
        layers: which streams.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        ids: Sequence[list[int]],
        rows: Sequence[Tensor],
        lengths: Sequence[int],
        layers: Sequence[int],
    ) -> None:
        self._adapter, self._ids, self._rows, self._layers = adapter, ids, rows, layers
        self._starts = numpy.cumsum([0, *lengths]).tolist()
        self.dtype = numpy.float64 if adapter.dtype == torch.float64 else numpy.float32

    def __call__(self, texts: range, ranks: Ranks, *, progress: bool = False) -> dict[int, Array]:
        """Of texts that follow on each other, by layer their rows, whole in every process of ``ranks``."""
        adapter, first, end = self._adapter, self._starts[texts.start], self._starts[texts.stop]
        arrays = {
            layer: torch.zeros(end - first, adapter.d_model, dtype=_TORCH[self.dtype])
            for layer in self._layers
        }
        rows = [torch.where(self._rows[i] >= 0, self._rows[i] - first, -1) for i in texts]

        def reader(layer: int, targets: tuple[Tensor, Tensor, Tensor]) -> Callable[[Tensor], None]:
            where, row, column = targets

            def read(hidden: Tensor) -> None:
                found = hidden[row.to(hidden.device), column.to(hidden.device)]
                arrays[layer][where] = found.cpu().to(arrays[layer].dtype)

            return read

        # A pack reports completions: a text's first token is its prompt, which is looked up where it stands.
        pairs = [(self._ids[i][:1], self._ids[i][1:] or self._ids[i]) for i in texts]
        with exclusive(adapter), torch.no_grad(), undisturbed(adapter.hf_model):
            packs = packs_for(adapter, pairs, processes=ranks.sharing)
            for pack in dealt(packs, ranks, "Activations", progress=progress):
                targets = _targets(pack, rows)
                visit_residuals(adapter, pack, {layer: reader(layer, targets) for layer in self._layers})
        ranks.added(list(arrays.values()))  # each row was read by one process
        return {layer: found.numpy() for layer, found in arrays.items()}


_TORCH = {numpy.float32: torch.float32, numpy.float64: torch.float64}


def _places(tokens: str | int | slice, length: int, text: int) -> list[int]:
    if isinstance(tokens, str) and tokens in ("last", "all"):
        return [length - 1] if tokens == "last" else list(range(length))
    selector = None if tokens is None or isinstance(tokens, str) else check_tokens(tokens)
    if selector is None:
        raise ValidationError(f"tokens is 'last', 'all', a place or a slice; got {tokens!r}.")
    found = range(length)[selector if isinstance(selector, slice) else slice(selector, selector + 1 or None)]
    if not found:
        raise ValidationError(
            f"text {text} has {length} tokens, and none of them is meant by tokens={tokens!r}."
        )
    return list(found)


def _targets(pack: Pack, rows: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of the result, and where in a pack what goes there stands: rows and columns."""
    pair, row, column = pack.pair.cpu(), pack.row.cpu(), pack.column.cpu()
    position, segment, parent = pack.position_ids.cpu(), pack.segment.cpu(), pack.parent.cpu()
    target, at_row, at_column = [], [], []
    for i in sorted(set(pair.tolist())):
        (own,) = torch.nonzero(pair == i, as_tuple=True)
        first = own[0]
        prompt = parent[row[first], column[first]]
        (begin,) = torch.nonzero((segment[row[first]] == prompt) & (position[row[first]] == 0), as_tuple=True)
        places = rows[i]
        target.append(places[:1])
        at_row.append(row[first][None])
        at_column.append(begin[:1])
        rest = len(places) - 1  # none for a text of one token, whose completion only fills the place
        target.append(places[1:])
        at_row.append(row[own[:rest]])
        at_column.append(column[own[:rest]])
    where = torch.cat(target)
    kept = where >= 0
    return where[kept], torch.cat(at_row)[kept], torch.cat(at_column)[kept]
