"""Batches of (prompt, completion) pairs as rows of tokens: every prompt once, almost no padding.

A row holds one or more prompt trees: a prompt, then its completions. A tree mask lets each completion see
its own prompt and itself only, and position ids are those that the tokens would have alone.
"""

from __future__ import annotations

import bisect
import math
import sys
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import ValidationError
from .pauses import pass_tokens
from .positions import Positions, given_positions
from .regimes import each_alone, text_lengths

__all__ = ["TREES", "Mask", "Pack", "PackLayout", "build_packs", "usual_tokens"]

PackLayout = Literal["tree", "padded"]
# How a model takes a tree mask: one; one already cut to its attention window; or one by kind of layer.
Mask = Literal["plain", "window", "dict"]
TREES: tuple[Mask, ...] = ("plain", "window", "dict")
Pair = tuple[Sequence[int], Sequence[int]]

# Measured on two CPU cores with a 110 M Llama (benchmarks/test_caa.py): wider rows spend more on attention between
# trees that don't see each other, narrower ones more on padding; larger batches leave the caches.
ROW_TOKENS = 192
BATCH_TOKENS = 1024
# Enough to fill a GPU; not measured.
BATCH_TOKENS_GPU = 8192
# Positions of a mask that are worked out at once.
MASK_CHUNK = 1 << 22
# Rows of a mask begin at multiples of so many numbers.
MASK_STEP = 8

_BY_TOKEN = ("input_ids", "position_ids", "segment", "parent", "prompt_length", "text_length", "source")
_BY_TARGET = ("row", "column", "predictor", "target", "pair")


def usual_tokens(device: torch.device) -> int:
    """Tokens of a pass on a device: as many as suit it, or fewer where others wait for the model meanwhile."""
    return pass_tokens(BATCH_TOKENS if device.type == "cpu" else BATCH_TOKENS_GPU)


@dataclass
class _Tree:
    prompt: tuple[int, ...]
    pairs: list[int] = field(default_factory=list)
    size: int = 0
    longest: int = 0


@dataclass(frozen=True, eq=False)
class Pack:
    """One batch of rows ready for a model.

    Attributes:
        layout: "tree" (a 4-D tree mask) or "padded" (one pair a row, right-padded, a 2-D mask).
        input_ids: [B, T] int64.
        position_ids: [B, T] int64; 0 for padding.
        segment: [B, T] int64, number of the prompt or completion within the row; -1 for padding.
        parent: [B, T] int64, segment of the prompt that a completion's token continues; -1 in prompts and
            padding.
        prompt_length: [B, T] int64, tokens of the prompt that a token belongs to or continues; 0 for padding.
        text_length: [B, T] int64, tokens of the longest prompt and completion that a token belongs to, laid out or
            not; 0 for padding.
        source: [B, T] int64, group of the pair(s) that a token belongs to; -1 for padding.
        row, column: [N] int64, where each completion token stands; column -1 for one that was left out.
        predictor: [N] int64, column whose hidden state predicts it.
        target: [N] int64, its token id.
        pair: [N] int64, index of its (prompt, completion) pair in the input; tokens of one pair are in order.
        mask: how the model takes its tree mask.
    """

    layout: PackLayout
    input_ids: Tensor
    position_ids: Tensor
    segment: Tensor
    parent: Tensor
    prompt_length: Tensor
    text_length: Tensor
    source: Tensor
    row: Tensor
    column: Tensor
    predictor: Tensor
    target: Tensor
    pair: Tensor
    mask: Mask = field(default="plain", kw_only=True)

    @cached_property
    def longest(self) -> int:
        """Tokens on the longest path from a prompt's start to a completion's end."""
        return int(self.position_ids.max()) + 1

    @property
    def positions(self) -> Positions:
        """Where each token stands on its own path, for edits that name token positions."""
        return Positions(self.position_ids.masked_fill(self.segment < 0, -1), self.prompt_length)

    @contextmanager
    def running(self, model: nn.Module) -> Iterator[None]:
        """Runs a block in which the model's calls are over this pack: every token is what it would be alone."""
        with given_positions(self.positions), text_lengths(self.text_length), each_alone(model):
            yield

    @property
    def in_prompt(self) -> Tensor:
        """[B, T] bool: tokens of prompts."""
        return (self.segment >= 0) & (self.parent < 0)

    def predictors_of(self, hidden: Tensor) -> Tensor:
        """[N, …] what of ``hidden`` [B, T, …] predicts each completion token, on hidden's device."""
        return hidden[self.row.to(hidden.device), self.predictor.to(hidden.device)]

    def tokens_of(self, hidden: Tensor) -> Tensor:
        """[N, …] what of ``hidden`` [B, T, …] stands at each completion token, on hidden's device."""
        return hidden[self.row.to(hidden.device), self.column.to(hidden.device)]

    def to(self, device: torch.device) -> Pack:
        """The same pack on another device."""
        if device == self.input_ids.device:
            return self
        # In one transfer: each takes as long as a kernel or two.
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        held = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        moved = torch.cat([t.flatten() for t in held.values()]).to(device)
        parts = torch.split(moved, [t.numel() for t in held.values()])
        made: dict[str, Any] = {
            name: part.view_as(t) for (name, t), part in zip(held.items(), parts, strict=True)
        }
        return replace(self, **made)

    def repeated(self, copies: int) -> Pack:
        """The rows ``copies`` times over, for as many batches at once; ``pair`` keeps its numbers in every copy."""
        return self.joined([self] * copies)

    @staticmethod
    def joined(packs: Sequence[Pack]) -> Pack:
        """The rows of packs of one width and form, one pack's after another's; ``pair`` keeps its numbers in each."""
        first, *others = packs
        if not others:
            return first
        held = {
            name: torch.cat([getattr(one, name) for one in packs])
            for name in (*_BY_TOKEN, *_BY_TARGET)
            if name != "row"
        }
        starts = accumulate((len(one.input_ids) for one in packs), initial=0)
        row = torch.cat([one.row + start for one, start in zip(packs, starts, strict=False)])
        made: dict[str, Any] = {**held, "row": row}
        return replace(first, **made)

    def selected(self, rows: Tensor) -> Pack:
        """Some of the rows [n], none twice, and what is scored in them; pairs keep their numbers."""
        place = torch.full_like(self.input_ids[:, 0], -1)
        place[rows] = torch.arange(len(rows), device=rows.device)
        kept = (place[self.row] >= 0).nonzero()[:, 0]
        by_token = {name: getattr(self, name)[rows] for name in _BY_TOKEN}
        scored = {name: getattr(self, name)[kept] for name in ("column", "predictor", "target", "pair")}
        return replace(self, **by_token, **scored, row=place[self.row[kept]])

    @property
    def n_seen(self) -> int:
        """Columns that a token may see."""
        return self.input_ids.shape[1]

    def visible(self, window: int | None = None) -> Tensor:
        """[B, T, T] bool: which token (last axis) each token sees.

        Args:
            window: of a sliding-window layer: only the last ``window`` positions of the token's own path.
        """
        return self._seen_by(0, self.input_ids.shape[1], window)

    def _seen_by(self, first: int, end: int, window: int | None) -> Tensor:
        """Columns ``first`` to ``end`` of :meth:`visible`'s middle axis, [B, end - first, T]."""
        mine = slice(first, end)
        column = torch.arange(self.input_ids.shape[1], device=self.segment.device)
        seen = self.segment[:, mine, None] == self.segment[:, None, :]
        seen |= self.parent[:, mine, None] == self.segment[:, None, :]
        seen &= (self.segment >= 0)[:, None, :]
        seen &= column[mine, None] >= column
        if window is not None:
            seen &= self.position_ids[:, mine, None] < self.position_ids[:, None, :] + window
        # A padding token sees itself: a row of nothing would be NaN in some kernels.
        return seen | (column[mine, None] == column)

    def additive_mask(self, dtype: torch.dtype, window: int | None = None) -> Tensor:
        """[B, 1, T, T]: 0 where a token is seen, the dtype's lowest number elsewhere."""
        batch, length = self.input_ids.shape
        # Attention on a GPU reads rows that begin at multiples of 8 numbers; of others it makes a copy at every layer.
        stored = math.ceil(self.n_seen / MASK_STEP) * MASK_STEP
        mask = torch.zeros(batch, 1, length, stored, dtype=dtype, device=self.input_ids.device)
        mask = mask[..., : self.n_seen]
        # In parts, so that next to the mask itself little is held.
        step = max(1, MASK_CHUNK // (batch * self.n_seen))
        for first in range(0, length, step):
            part = mask[:, 0, first : first + step]
            part.masked_fill_(~self._seen_by(first, first + step, window), torch.finfo(dtype).min)
        return mask

    def inputs(self, dtype: torch.dtype, window: int | None) -> dict[str, Any]:
        """Keyword arguments of the model's call.

        Args:
            dtype: the model's.
            window: its attention window in tokens, or None.
        """
        if self.layout == "padded":
            return {"input_ids": self.input_ids, "attention_mask": (self.segment >= 0).long()}
        mask: Tensor | dict[str, Tensor] = self.additive_mask(
            dtype, window if self.mask == "window" else None
        )
        if self.mask == "dict":
            mask = {"full_attention": mask, "sliding_attention": self.additive_mask(dtype, window)}  # type: ignore[dict-item]
        return {"input_ids": self.input_ids, "attention_mask": mask, "position_ids": self.position_ids}


def build_packs(
    pairs: Sequence[Pair],
    *,
    layout: PackLayout = "tree",
    groups: Sequence[Hashable] | None = None,
    row_tokens: int = ROW_TOKENS,
    batch_tokens: int = BATCH_TOKENS,
    tree_tokens: Callable[[int], int] | None = None,
    last_tokens: bool = True,
    apart: Sequence[Hashable] | None = None,
    mask_entries: int | None = None,
) -> list[Pack]:
    """Lays out (prompt ids, completion ids) pairs, longest first, so that no batch mixes long rows with short ones.

    Args:
        pairs: neither side empty.
        layout: "tree", or "padded" for models that can't take a tree mask.
        groups: one key a pair; pairs share a prompt only when its tokens and their keys agree (steered
            differently,
            they can't). ``Pack.source`` numbers the keys in order of first appearance. Default: one group
            for all.
        row_tokens: rows are filled up to this many tokens; a longer tree gets a row of its own.
        tree_tokens: from a prompt's length, how long its tree may become before it goes on in another, with the
            prompt again. Default: ``row_tokens``.
        batch_tokens: most tokens of a pack, padding included, unless one tree, or one pair, alone is longer; rows are
            not filled beyond it.
        last_tokens: lay out each completion's last token too. It predicts nothing that is scored.
        apart: one more key a pair that pairs which share a prompt agree in; it isn't numbered.
        mask_entries: most entries B·T·T of a tree pack's mask; a pair that is longer alone is a padded row, which
            needs no such mask. Default: no bound.

    Raises:
        ValidationError: an empty prompt or completion, or groups of another length.
    """
    keys: Sequence[Hashable] = [0] * len(pairs) if groups is None else groups
    if len(keys) != len(pairs):
        raise ValidationError(
            f"There are {len(pairs)} pairs but {len(keys)} groups; give one group per pair."
        )
    for i, (prompt, completion) in enumerate(pairs):
        if not len(prompt) or not len(completion):
            raise ValidationError(f"Pair {i} has an empty {'prompt' if not len(prompt) else 'completion'}.")
    numbers = {key: n for n, key in enumerate(dict.fromkeys(keys))}
    source = [numbers[key] for key in keys]
    inputs = pairs if last_tokens else [(prompt, completion[:-1]) for prompt, completion in pairs]
    row_tokens = min(row_tokens, batch_tokens)
    widest = sys.maxsize if mask_entries is None else math.isqrt(mask_entries)
    room = tree_tokens or (lambda _: row_tokens)
    together = [key if apart is None else (key, apart[i]) for i, key in enumerate(source)]
    trees = _trees(pairs, inputs, together, layout, lambda n: min(room(n), widest))
    packs: list[Pack] = []
    plain = [layout == "padded" or tree.size > widest for tree in trees]
    forms: tuple[tuple[PackLayout, bool], ...] = (("padded", True), ("tree", False))
    for form, kind in forms:
        members = [tree for tree, alone in zip(trees, plain, strict=True) if alone == kind]
        rows = _fill_rows(members, min(row_tokens, widest) if form == "tree" else 0)
        while rows:
            width = sum(t.size for t in rows[0])
            count = batch_tokens // width if form == layout else 1
            if form == "tree" and mask_entries is not None:
                count = min(count, mask_entries // width**2)
            count = max(1, count)
            packs.append(_lay_out(rows[:count], pairs, source, form, last_tokens))
            rows = rows[count:]
    return packs


def _trees(
    texts: Sequence[Pair],
    pairs: Sequence[Pair],
    together: Sequence[Hashable],
    layout: PackLayout,
    tree_tokens: Callable[[int], int],
) -> list[_Tree]:
    """Pairs grouped by prompt; a tree that outgrows its room goes on in another with the prompt again."""
    trees: list[_Tree] = []
    growing: dict[Hashable, _Tree] = {}
    for i, (prompt, completion) in enumerate(pairs):
        key: Hashable = i if layout == "padded" else (together[i], tuple(prompt))
        tree = growing.get(key)
        # What writes nothing costs nothing: its one token is predicted at the prompt's end.
        grows = len(completion) > 0 and tree is not None and tree.size > len(prompt)
        if tree is None or (grows and tree.size + len(completion) > tree_tokens(len(prompt))):
            tree = growing[key] = _Tree(tuple(prompt), size=len(prompt))
            trees.append(tree)
        tree.pairs.append(i)
        tree.size += len(completion)
        tree.longest = max(tree.longest, len(prompt) + len(texts[i][1]))
    return trees


def _fill_rows(trees: list[_Tree], row_tokens: int) -> list[list[_Tree]]:
    """Best fit, longest tree first; rows come back longest first."""
    rows: list[list[_Tree]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for tree in sorted(trees, key=lambda t: -t.size):
        place = bisect.bisect_left(room, (tree.size, -1))
        if place < len(room):
            left, r = room.pop(place)
            rows[r].append(tree)
        else:
            left, r = row_tokens, len(rows)
            rows.append([tree])
        bisect.insort(room, (left - tree.size, r))
    return sorted(rows, key=lambda row: -sum(t.size for t in row))


def _lay_out(
    trees_by_row: list[list[_Tree]],
    pairs: Sequence[Pair],
    source: list[int],
    layout: PackLayout,
    last_tokens: bool,
) -> Pack:
    """What holds for all tokens of a stretch, a prompt or a completion, is noted once and then spread over them."""
    width = max(sum(tree.size for tree in trees) for trees in trees_by_row)
    ids: list[int] = []
    targets: list[int] = []
    # Tokens; first position, segment, parent, tokens of the prompt and of the text, group.
    stretches: list[tuple[int, ...]] = []
    # Scored tokens; those laid out, row, column of the first, column before it, pair.
    completions: list[tuple[int, ...]] = []
    for r, trees in enumerate(trees_by_row):
        end = segment = 0
        for tree in trees:
            n_prompt, prompt, group = len(tree.prompt), segment, source[tree.pairs[0]]
            ids += tree.prompt
            stretches.append((n_prompt, 0, segment, -1, n_prompt, tree.longest, group))
            end += n_prompt
            prompt_end = end - 1
            for i in tree.pairs:
                completion = pairs[i][1]
                n, segment = len(completion) - (not last_tokens), segment + 1
                ids += completion[:n]
                targets += completion
                stretches.append((n, n_prompt, segment, prompt, n_prompt, tree.longest, group))
                completions.append((len(completion), n, r, end, prompt_end, i))
                end += n
            segment += 1
        ids += [0] * (width - end)
        stretches.append((width - end, 0, -1, -1, 0, 0, -1))
    place, (first, *shared) = _spread(stretches)
    position = torch.where(shared[0] < 0, 0, first + place)
    held = [t.view(-1, width) for t in (torch.tensor(ids), position, *shared)]
    place, (written, row, first, before, pair) = _spread(completions)
    column = torch.where(place < written, first + place, -1)
    predictor = torch.where(place == 0, before, first + place - 1)
    held += [row, column, predictor, torch.tensor(targets), pair]
    return Pack(layout, *held)


def _spread(stretches: list[tuple[int, ...]]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Of each token its place in its stretch, and what is noted of that after the number of its tokens."""
    counts, *noted = torch.tensor(stretches, dtype=torch.int64).T
    starts = counts.cumsum(0) - counts
    place = torch.arange(int(counts.sum())) - starts.repeat_interleave(counts)
    return place, tuple(column.repeat_interleave(counts) for column in noted)
