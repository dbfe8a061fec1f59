"""Keys and values of texts that were read, so that a text which begins alike is read from there on."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
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
from .request import Steer
from .row import Row

__all__ = ["Prefix", "Prefixes"]

_LEAST = 16  # tokens of a text that is worth keeping, and by which one is looked for


@dataclass(frozen=True)
class Prefix:
    """A text that was read.

    Args:
        owner: whose it is.
        tokens: its token ids.
        steering: by what it was steered.
        prompt_length: how many of them were the prompt, from whose end edits may count.
        states: per layer its keys and values [1, heads, tokens, width], those of the last tokens where a layer has a
            window and let go of the others; or None for a layer that keeps none.
        least: how many of the first tokens have to be taken at least: layers with a window have let go of what the
            text behind fewer of them sees.
    """

    owner: Hashable
    tokens: tuple[int, ...]
    steering: tuple[Steer, ...]
    prompt_length: int
    states: tuple[tuple[Tensor, Tensor] | None, ...]
    least: int = 0

    @property
    def n_bytes(self) -> int:
        """Memory of the keys and values."""
        return tensor_bytes(states for layer in self.states if layer is not None for states in layer)

    @cached_property
    def _ids(self) -> Any:
        return numpy.array(self.tokens)

    def shared(self, tokens: Any, steering: Sequence[Steer], prompt_length: int) -> int:
        """How many of the first tokens, an array of ids, have the same keys and values in a text that is steered so."""
        n = min(len(self.tokens), len(tokens))
        differs = numpy.flatnonzero(self._ids[:n] != tokens[:n])
        n = int(differs[0]) if len(differs) else n
        ours = _reaches(self.steering, n, self.prompt_length)
        others = _reaches(steering, n, prompt_length)
        for i in range(max(len(ours), len(others))):
            if i < len(ours) and i < len(others) and ours[i][0] == others[i][0]:
                apart = numpy.flatnonzero(ours[i][1][:n] != others[i][1][:n])
                n = int(apart[0]) if len(apart) else n
            else:  # From here on they have nothing to do with each other.
                for _, reached in (*ours[i:], *others[i:]):
                    n = min(n, int(numpy.flatnonzero(reached)[0]))
                break
        return n


class Prefixes:
    """Texts that were read, the latest ones, as many as fit.

    Args:
        most_bytes: of keys and values that are kept; 0 keeps none.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most = most_bytes
        self._kept: OrderedDict[int, Prefix] = OrderedDict()
        self._by_start: dict[tuple[object, ...], list[int]] = {}
        self._number = 0
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

        One at least of the row's is left, to choose its next token from.
        """
        tokens, steering, prompt_length = row.known[:-1], row.steering, len(row.ids)
        onlooker = row.request.onlooker
        if (onlooker is not None and onlooker.altered) or _varies(steering) or row.undecided:
            return None
        best: tuple[int, int] | None = None
        numbers = self._by_start.get(_start(row.request.owner, tokens), ())
        ids = numpy.array(tokens) if numbers else None
        for number in numbers:
            kept = self._kept[number]
            n = kept.shared(ids, steering, prompt_length)
            if n >= max(_LEAST, kept.least) and (best is None or n > best[0]):
                best = n, number
        if best is None:
            return None
        self._kept.move_to_end(best[1])
        return self._kept[best[1]], best[0]

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
            made.admit_states(prefix.states, len(prefix.tokens), n, columns)
        return {name: made}

    def keep(self, row: Row, n: int, kept: Carried, place: int) -> None:
        """Copies a row's keys and values; what one of the kept texts has already is not kept twice.

        Args:
            row: whose.
            n: how many of its tokens are there.
            kept: the batch's cache, by the name of its argument.
            place: the row's place there.
        """
        tokens, steering, prompt_length = row.known[:n], row.steering, len(row.ids)
        if len(tokens) < _LEAST or self._most <= 0 or _varies(steering):
            return
        ((name, cache),) = kept.items()
        states = cache.states_of(place, n)
        if states is None:
            return
        n_bytes = sum(one.nbytes for layer in states if layer is not None for one in layer)
        if n_bytes > self._most:
            return
        least = _least(kinds(cache), states, n)
        start, ids = _start(row.request.owner, tokens), numpy.array(tokens)
        for number in list(self._by_start.get(start, ())):
            other = self._kept[number]
            common = other.shared(ids, steering, prompt_length)
            if common == n >= other.least:
                self._kept.move_to_end(number)
                return
            if common == len(other.tokens) >= least:
                self._forget(number)
        while self._kept and self.n_bytes + n_bytes > self._most:
            self._forget(next(iter(self._kept)))
        copied = tuple(layer and (layer[0].clone(), layer[1].clone()) for layer in states)
        self._number += 1
        self._like = self._like or {name: RollingCache(cache)}
        self._kept[self._number] = Prefix(
            row.request.owner, tuple(tokens), steering, prompt_length, copied, least
        )
        self._by_start.setdefault(start, []).append(self._number)
        self.n_bytes += n_bytes

    def clear(self) -> None:
        """Forgets all of them."""
        self._kept.clear()
        self._by_start.clear()
        self.n_bytes = 0

    def _forget(self, number: int) -> None:
        prefix = self._kept.pop(number)
        self.n_bytes -= prefix.n_bytes
        start = _start(prefix.owner, prefix.tokens)
        self._by_start[start].remove(number)
        if not self._by_start[start]:
            del self._by_start[start]


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


def _start(owner: Hashable, tokens: Sequence[int]) -> tuple[object, ...]:
    return (owner, *tokens[:_LEAST])


def _reaches(
    steering: Sequence[Steer], n: int, prompt_length: int
) -> list[tuple[tuple[int, bytes, float], Any]]:
    """The edits that reach one of the first ``n`` tokens: layer, content and strength, and which ones [n]."""
    places = numpy.arange(n)
    found = []
    for steer in steering:
        reached = selects(steer.tokens, places, lambda: prompt_length)
        if reached.any():
            found.append(((steer.layer, _content(steer.edit), steer.strength), reached))
    return found


_contents: WeakKeyDictionary[Edit, tuple[tuple[int, ...], bytes]] = WeakKeyDictionary()


def _content(edit: Edit) -> bytes:
    """A hash of what an edit does; one that was seen and not written to since isn't read again."""
    known = _contents.get(edit)
    if known is None or known[0] != edit.versions():
        digest = hashlib.blake2b(digest_size=16)
        for part in _parts(edit):
            digest.update(part)
        known = _contents[edit] = (edit.versions(), digest.digest())
    return known[1]


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
