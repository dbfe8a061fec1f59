"""The residual stream at chosen tokens of many texts, as arrays in memory or in files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..errors import NotFoundError, ValidationError
from .forward import packs_for
from .given import as_list
from .models import adapter_for
from .models.adapter import ModelAdapter, exclusive, undisturbed
from .pack import Pack
from .passes import visit_residuals
from .pauses import pause
from .positions import check_tokens
from .ranks import alone, current_ranks
from .text import Prompt, encode_prompt

__all__ = ["Activations", "activations"]

Array = numpy.ndarray[Any, Any]


class Activations(Mapping[int, Array]):
    """``{layer: [n, d_model]}``, the chosen tokens of all texts one after another.

    Args:
        arrays: by layer.
        lengths: how many of the rows are each text's.
    """

    def __init__(self, arrays: Mapping[int, Array], lengths: Sequence[int]) -> None:
        self._arrays, self.lengths = dict(arrays), list(lengths)

    def __getitem__(self, layer: int) -> Array:
        return self._arrays[layer]

    def __iter__(self) -> Iterator[int]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def by_text(self, layer: int) -> list[Array]:
        """A layer's rows, text by text."""
        return numpy.split(self._arrays[layer], numpy.cumsum(self.lengths)[:-1])

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Activations:
        """Opens what ``activations(…, out=folder)`` wrote; the arrays stay in their files.

        Raises:
            NotFoundError: there are none in the folder.
        """
        found = Path(folder)
        if not (found / "lengths.npy").is_file():
            raise NotFoundError(f"{found} holds no activations: give the folder that was named as out.")
        arrays = {int(path.stem.removeprefix("layer_")): path for path in found.glob("layer_*.npy")}
        opened = {layer: numpy.load(arrays[layer], mmap_mode="r") for layer in sorted(arrays)}
        return cls(opened, numpy.load(found / "lengths.npy").tolist())

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
        out: a folder for the arrays, ``layer_3.npy`` and so on, which then stay in their files: for more than memory
            holds. Those of an earlier call are deleted. Of several processes the first writes them, and all open them.
        progress: show a progress bar.

    Returns:
        Arrays in float32 (float64 for float64 models).

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
    dtype = numpy.float64 if adapter.dtype == torch.float64 else numpy.float32
    ranks = current_ranks()
    if out is not None and ranks.size > 1:
        with ranks.together(), alone():
            if ranks.rank == 0:
                activations(adapter, ids, indices, tokenizer, tokens=tokens, out=out, progress=progress)
        return Activations.load(out)
    if out is not None:
        _empty(Path(out))
    arrays = {layer: _array(out, layer, (n, adapter.d_model), dtype) for layer in indices}

    def reader(layer: int, targets: tuple[Array, Tensor, Tensor]) -> Callable[[Tensor], None]:
        where, row, column = targets

        def read(hidden: Tensor) -> None:
            arrays[layer][where] = (
                hidden[row.to(hidden.device), column.to(hidden.device)].cpu().to(_TORCH[dtype])
            )

        return read

    # A pack reports completions: a text's first token is its prompt, which is looked up where it stands.
    pairs = [(one[:1], one[1:] or one) for one in ids]
    with exclusive(adapter), torch.no_grad(), undisturbed(adapter.hf_model):
        for pack in tqdm(packs_for(adapter, pairs), desc="Activations", unit="batch", disable=not progress):
            pause()
            targets = _targets(pack, rows)
            visit_residuals(adapter, pack, {layer: reader(layer, targets) for layer in indices})
    if out is not None:
        numpy.save(Path(out) / "lengths.npy", numpy.array(lengths))
        for array in arrays.values():
            array.flush()
    return Activations(arrays, lengths)


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


def _targets(pack: Pack, rows: Sequence[Tensor]) -> tuple[Array, Tensor, Tensor]:
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
    return where[kept].numpy(), torch.cat(at_row)[kept], torch.cat(at_column)[kept]


def _empty(folder: Path) -> None:
    """Makes room for arrays, so that none of other texts is opened beside them."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ValidationError(f"out is a folder, and {folder} is or lies in a file: name another.") from None
    for path in (folder / "lengths.npy", *folder.glob("layer_*.npy")):
        path.unlink(missing_ok=True)


def _array(out: str | os.PathLike[str] | None, layer: int, shape: tuple[int, int], dtype: Any) -> Any:
    if out is None:
        return numpy.zeros(shape, dtype)
    path = Path(out) / f"layer_{layer}.npy"
    return numpy.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
