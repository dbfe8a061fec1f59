"""Keys and values of texts that were read, so that a text which begins alike is read from there on."""

from __future__ import annotations

import hashlib
import itertools
import struct
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy
import torch
from torch import Tensor

from ..._private.transformers import Cache
from ..intervention import Edit
from ..memory import tensor_bytes
from ..positions import selects
from .cache import RollingCache, kinds
from .calls import Carried
from .prefix_tree import PrefixTree
from .request import Steer
from .row import Row

__all__ = ["Prefix", "Prefixes"]

_LEAST = 16  # tokens of a text that is worth keeping, or going on from
_MOST_ASKED = 64  # texts that are asked whether their windows let a row go on from them


@dataclass(frozen=True)
class Prefix:
    """A text that was read.

    Args:
        owner: whose it is.
        labels: its tokens and what edited them, as ``_labels`` tells them.
        states: per layer its keys and values [1, heads, tokens, width], those of the last tokens where a layer has a
            window and let go of the others; or None for a layer that keeps none.
        least: how many of the first tokens have to be taken at least: layers with a window have let go of what the
            text behind fewer of them sees.
    """

    owner: Hashable
    labels: Any
    states: tuple[tuple[Tensor, Tensor] | None, ...]
    least: int = 0

    @property
    def n_bytes(self) -> int:
        """Memory of the keys and values."""
        return tensor_bytes(states for layer in self.states if layer is not None for states in layer)


class Prefixes:
    """Texts that were read, the latest ones, as many as fit.

    Args:
        most_bytes: of keys and values that are kept; 0 keeps none.

    Attributes:
        most_bytes: the same.
    """

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self._kept: OrderedDict[int, Prefix] = OrderedDict()
        self._trees: dict[Hashable, PrefixTree] = {}
        self._number = self._changes = 0
        self._like: dict[str, Cache] = {}
        self.under: object = None
        """What was attached to the model when it read the texts that are kept."""
        self.n_bytes = 0
        """Memory that they take."""

    def __len__(self) -> int:
        return len(self._kept)

    def made_under(self, hooks: object) -> None:
        """Says what is attached to the model from now on; what was read under something else is forgotten."""
        if hooks != self.under:
            self.clear()
            self.under = hooks

    def find(self, row: Row) -> tuple[Prefix, int] | None:
        """The text that shares most of its first tokens with this row's, and how many, or None.

        One at least of the row's is left, to choose its next token from. The text counts as used.
        """
        known = self._shared(row)
        if known is None:
            return None
        n, number = known
        self._kept.move_to_end(number)
        return self._kept[number], n

    def n_shared(self, row: Row) -> int:
        """How many of a row's first tokens ``find`` would give, 0 for none; no text counts as used."""
        known = self._shared(row)
        return 0 if known is None else known[0]

    def _shared(self, row: Row) -> tuple[int, int] | None:
        onlooker = row.request.onlooker
        if (onlooker is not None and onlooker.altered) or _varies(row.steering) or row.undecided:
            return None
        known = row.found_prefix
        now = self._changes, row.n_known, id(row.steering)
        if known is None or known[0] != now:
            known = row.found_prefix = now, self._longest(row)
        return known[1]

    def _longest(self, row: Row) -> tuple[int, int] | None:
        """How many tokens the best text for a row shares with it, and its number."""
        tree = self._trees.get(row.request.owner)
        if tree is None:
            return None
        shared = itertools.islice(tree.sharing(_labels(row, row.n_known - 1)), _MOST_ASKED)
        return next((one for one in shared if one[0] >= max(_LEAST, self._kept[one[1]].least)), None)

    def cache(self, found: Sequence[tuple[Prefix, int] | None], columns: int) -> Carried:
        """What a model is given to go on from texts, right-aligned in this many columns.

        Args:
            found: for each row a text and how many of its first tokens, or None for a row that begins later.
            columns: at least as many.
        """
        ((name, like),) = self._like.items()
        made = RollingCache(like)
        some = next(one[0] for one in found if one is not None)
        for one in found:
            prefix, n = (some, 0) if one is None else one
            made.admit_states(prefix.states, len(prefix.labels), n, columns)
        return {name: made}

    def keep(self, row: Row, n: int, kept: Carried, place: int) -> None:
        """Copies a row's keys and values; what one of the kept texts has already is not kept twice.

        Args:
            row: whose.
            n: how many of its tokens are there.
            kept: the batch's cache, by the name of its argument.
            place: the row's place there.
        """
        if n < _LEAST or self.most_bytes <= 0 or _varies(row.steering):
            return
        ((name, cache),) = kept.items()
        states = cache.states_of(place, n)
        if states is None:
            return
        n_bytes = sum(one.nbytes for layer in states if layer is not None for one in layer)
        if n_bytes > self.most_bytes:
            return
        least = min(_least(kinds(cache), states, n), n)
        owner, labels = row.request.owner, _labels(row, n)
        tree = self._trees.get(owner) or PrefixTree()
        for common, number in itertools.islice(tree.sharing(labels), _MOST_ASKED):
            if common < n:
                break
            if n >= self._kept[number].least:
                self._kept.move_to_end(number)
                return
        for number in tree.beginning(labels):
            if len(self._kept[number].labels) >= least:
                self._forget(number)
        while self._kept and self.n_bytes + n_bytes > self.most_bytes:
            self._forget(next(iter(self._kept)))
        copied = tuple(layer and (layer[0].clone(), layer[1].clone()) for layer in states)
        self._number += 1
        self._like = self._like or {name: RollingCache(cache)}
        self._kept[self._number] = Prefix(owner, labels, copied, least)
        self._trees.setdefault(owner, PrefixTree()).add(labels, self._number)
        self.n_bytes += n_bytes
        self._changes += 1

    def clear(self) -> None:
        """Forgets all of them."""
        self._kept.clear()
        self._trees.clear()
        self.n_bytes = 0
        self._changes += 1

    def _forget(self, number: int) -> None:
        prefix = self._kept.pop(number)
        self.n_bytes -= prefix.n_bytes
        self._changes += 1
        tree = self._trees[prefix.owner]
        tree.remove(prefix.labels)
        if not tree:
            del self._trees[prefix.owner]


def _least(windows: Sequence[int | None], states: Sequence[tuple[Tensor, Tensor] | None], n: int) -> int:
    """See :class:`Prefix`; ``windows`` and ``states`` by layer, of a text of ``n`` tokens."""
    least = 0
    for window, pair in zip(windows, states, strict=True):
        gone = 0 if pair is None else n - pair[0].shape[2]
        if gone and window is not None:
            least = max(least, gone + window - 1)
    return least


def _varies(steering: Sequence[Steer]) -> bool:
    """Whether edits differ from token to token, so that texts that begin alike may have been edited differently."""
    return any(steer.varying is not None for steer in steering)


def _labels(row: Row, n: int) -> Any:
    """[n, 2] int64: a row's first tokens, and for each of them a hash of the edits that reach it, in their order."""
    labels = numpy.zeros((n, 2), numpy.int64)
    labels[:, 0] = row.known[:n]
    if row.steering and n:
        places, contents = numpy.arange(n), [_content(steer) for steer in row.steering]
        reached = [selects(steer.tokens, places, lambda: len(row.ids)) for steer in row.steering]
        # Most edits reach all tokens, or all from some place on: few sets of them are to be told apart.
        sets, which = numpy.unique(numpy.stack(reached, axis=1), axis=0, return_inverse=True)
        hashes = [_hash(itertools.compress(contents, members)) for members in sets]
        labels[:, 1] = numpy.array(hashes, numpy.int64)[which.reshape(-1)]
    return labels


def _hash(contents: Iterable[bytes]) -> int:
    joined = b"".join(contents)
    return (
        int.from_bytes(hashlib.blake2b(joined, digest_size=8).digest(), "little", signed=True)
        if joined
        else 0
    )


_contents: WeakKeyDictionary[Edit, tuple[tuple[int, ...], bytes]] = WeakKeyDictionary()


def _content(steer: Steer) -> bytes:
    """Its layer, its strength and a hash of its edit; one that was seen and not written to since isn't read again."""
    edit = steer.edit
    known = _contents.get(edit)
    if known is None or known[0] != edit.versions():
        digest = hashlib.blake2b(digest_size=16)
        for part in _parts(edit):
            digest.update(part)
        known = _contents[edit] = (edit.versions(), digest.digest())
    return struct.pack("<qd", steer.layer, steer.strength) + known[1]


def _parts(edit: Edit) -> Iterator[bytes]:
    gate = edit.gate
    named = {"bias": edit.bias, "left": edit.left, "right": edit.right, "matrix": edit.matrix}
    if gate is not None:
        named |= {"kinds": gate.kinds, "weight": gate.weight, "offset": gate.offset}
    for name, tensor in named.items():
        if tensor is not None:
            whole = tensor.detach().cpu().contiguous()
            yield f"{name}:{whole.dtype}:{tuple(whole.shape)};".encode()
            yield whole.reshape(-1).view(torch.uint8).numpy().tobytes()
