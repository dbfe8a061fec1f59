"""What stays the same from step to step: packed completions, and which edit each of their tokens gets."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from ..forward import TREE_PROMPTS, packs_for
from ..intervention import compute_dtype
from ..models.adapter import ModelAdapter
from ..pack import Pack
from ..pauses import pass_tokens
from ..positions import token_mask
from ..ranks import current_ranks
from .datapoints import Completion

__all__ = ["MINIBATCH_PACK_TOKENS", "Layout", "LayoutSpec", "StepPack", "TokenOrder"]

# Most tokens of a pack from which minibatches take rows; what is kept for it is its residual stream.
MINIBATCH_PACK_TOKENS = 16_384
# Parts of packs that are remembered: jobs of one seed take the same minibatches.
PARTS = 256


@dataclass(frozen=True)
class TokenOrder:
    """Which of a pack's scored tokens belong to which completion.

    Attributes:
        places: the pack's completions in order.
        completions: [P] int64, the same on the device.
        dst, src: indices of the tokens of completions to promote and to suppress.
        owner: [N] int64, place in ``completions`` of each token, dst tokens first.
        share: [N] 1/(tokens of the completion), in that order.
    """

    places: tuple[int, ...]
    completions: Tensor
    dst: Tensor
    src: Tensor
    owner: Tensor
    share: Tensor

    @classmethod
    def of(cls, pack: Pack, completions: Sequence[Completion], dtype: torch.dtype) -> TokenOrder:
        """The order of a pack's tokens; ``completions`` are the pairs that it was built of."""
        pair = pack.pair.tolist()
        present = sorted(set(pair))
        place = {i: p for p, i in enumerate(present)}
        sides: tuple[list[int], list[int]] = ([], [])
        for n, i in enumerate(pair):
            sides[completions[i].side == "src"].append(n)
        order = [pair[n] for side in sides for n in side]

        def tensor(values: Sequence[float], kind: torch.dtype = torch.int64) -> Tensor:
            return torch.tensor(values, dtype=kind, device=pack.pair.device)

        return cls(
            tuple(present),
            tensor(present),
            tensor(sides[0]),
            tensor(sides[1]),
            tensor([place[i] for i in order]),
            tensor([1 / len(completions[i].ids) for i in order], dtype),
        )

    @classmethod
    def joined(cls, orders: Sequence[TokenOrder]) -> TokenOrder:
        """The order of packs' tokens one pack after another; a completion counts anew in each."""
        if len(orders) == 1:
            return orders[0]
        tokens = list(accumulate((one.owner.numel() for one in orders), initial=0))
        firsts = list(accumulate((len(one.places) for one in orders), initial=0))
        sides: list[list[Tensor]] = [[], []]
        owners: list[list[Tensor]] = [[], []]
        shares: list[list[Tensor]] = [[], []]
        for one, token, first in zip(orders, tokens, firsts, strict=False):
            n = one.dst.numel()
            for side, (mine, part) in enumerate(((one.dst, slice(n)), (one.src, slice(n, None)))):
                sides[side].append(mine + token)
                owners[side].append(one.owner[part] + first)
                shares[side].append(one.share[part])
        return cls(
            sum((one.places for one in orders), ()),
            torch.cat([one.completions for one in orders]),
            torch.cat(sides[0]),
            torch.cat(sides[1]),
            torch.cat(owners[0] + owners[1]),
            torch.cat(shares[0] + shares[1]),
        )


@dataclass(frozen=True, eq=False)
class StepPack:
    """A pack, and the edit slot of each of its tokens.

    Attributes:
        pack: what is run.
        slots: [B, T] int32, the slot whose edit a token gets, -1 for none.
        everywhere: there is one slot and every token gets it.
        order: whose tokens are scored where.
    """

    pack: Pack
    slots: Tensor
    everywhere: bool
    order: TokenOrder

    @property
    def n_tokens(self) -> int:
        """Tokens of the pack, padding included."""
        return self.pack.input_ids.numel()


@dataclass(frozen=True, eq=False)
class LayoutSpec:
    """What a layout is made of; specs of equal keys share one.

    Args:
        completions: what is scored.
        only_prompt: edit tokens of prompts only.
        apart: every completion has a slot, and so a prompt, of its own.
        by_prompt: every prompt has rows of its own, so that minibatches can take them.
        batch_tokens: most tokens of a pack, None for what suits the device.
        to_the_end: lay out the last token of each completion too, which predicts nothing that is scored.
    """

    completions: tuple[Completion, ...]
    only_prompt: bool = False
    apart: bool = False
    by_prompt: bool = False
    batch_tokens: int | None = None
    to_the_end: bool = False

    @classmethod
    def joined(cls, specs: Sequence[LayoutSpec]) -> LayoutSpec:
        """All completions of specs of one kind, each spec's datapoints numbered on and in rows of their own."""
        first, completions, n = specs[0], [], 0
        for spec in specs:
            completions += [replace(c, datapoint=c.datapoint + n) for c in spec.completions]
            n += spec.n_datapoints
        return replace(first, completions=tuple(completions), by_prompt=True)

    @cached_property
    def n_datapoints(self) -> int:
        """How many datapoints the completions are numbered by."""
        return 1 + max(c.datapoint for c in self.completions)

    @cached_property
    def negated(self) -> list[bool]:
        """Of every slot, whether its edit is the negated vector's: a slot for each completion, or for each sign."""
        signs = [c.is_negative for c in self.completions]
        return signs if self.apart else sorted(set(signs))

    @cached_property
    def key(self) -> Hashable:
        """Equal for specs whose layouts are."""
        content = tuple((c.prompt, c.ids, c.side, c.steered) for c in self.completions)
        # What minibatches take is named by datapoint.
        owners = tuple(c.datapoint for c in self.completions) if self.by_prompt else ()
        flags = (self.only_prompt, self.apart, self.by_prompt, self.to_the_end)
        return content, owners, flags, self.batch_tokens


class Layout:
    """The packs of some completions, on the model's device.

    Args:
        adapter: the model.
        spec: what to lay out.

    Attributes:
        spec: as given.
        signs: [K, 1] ±1: whether a slot's edit is the vector's or the negated vector's.
        packs: in no particular order of completions.
    """

    def __init__(self, adapter: ModelAdapter, spec: LayoutSpec) -> None:
        self.spec = spec
        completions = spec.completions
        groups = [self._group(i) for i in range(len(completions))]
        packs = packs_for(
            adapter,
            [(c.prompt, c.ids) for c in completions],
            groups=groups,
            row_tokens=1 if spec.by_prompt else _row_tokens(completions, groups),
            batch_tokens=pass_tokens(MINIBATCH_PACK_TOKENS) if spec.by_prompt else spec.batch_tokens,
            scoring=not spec.to_the_end,
            processes=current_ranks(adapter).sharing,
        )
        dtype = compute_dtype(adapter.dtype)
        signs = [[-1.0 if negated else 1.0] for negated in spec.negated]
        self.signs = torch.tensor(signs, dtype=dtype, device=adapter.device)
        members: dict[Hashable, int] = {}
        for i, group in enumerate(groups):
            members.setdefault(group, i)
        self._first = list(members.values())  # a completion of each group, by the group's number in the pack
        self._slot = [
            i if spec.apart else spec.negated.index(c.is_negative) for i, c in enumerate(completions)
        ]
        self.packs = [self._step_pack(pack, dtype) for pack in packs]
        self._parts: dict[tuple[int, tuple[int, ...]], tuple[StepPack, Tensor] | None] = {}

    def _group(self, i: int) -> Hashable:
        completion = self.spec.completions[i]
        if self.spec.apart:
            return i
        return (completion.datapoint if self.spec.by_prompt else 0), completion.steered

    def _step_pack(self, pack: Pack, dtype: torch.dtype) -> StepPack:
        device = pack.input_ids.device
        first = [self.spec.completions[i] for i in self._first]
        by_group = torch.tensor([self._slot[i] for i in self._first], dtype=torch.int32, device=device)
        real = pack.segment >= 0
        edited = real & pack.in_prompt if self.spec.only_prompt else real
        positions = pack.positions
        for group, completion in enumerate(first):
            if completion.token is not None:
                chosen = token_mask(completion.token, positions)
                edited = edited & (chosen | (pack.source != group))
        slots = torch.where(edited, by_group[pack.source.clamp_min(0)], -1)
        everywhere = len(self.signs) == 1 and bool(edited[real].all())
        return StepPack(pack, slots, everywhere, TokenOrder.of(pack, self.spec.completions, dtype))

    def part(self, pack: int, prompts: tuple[int, ...] | None) -> tuple[StepPack, Tensor | None] | None:
        """What of a pack is of these datapoints, and which of its rows that is; None where nothing is.

        Args:
            pack: which of the packs.
            prompts: datapoints that have rows of their own; None for all, which is the whole pack.
        """
        if prompts is None:
            return self.packs[pack], None
        if len(self._parts) > PARTS:
            self._parts.clear()
        key = (pack, prompts)
        if key not in self._parts:
            wanted = set(prompts)
            rows = [row for row, owner in enumerate(self._rows_by_datapoint[pack]) if owner in wanted]
            self._parts[key] = self._part(self.packs[pack], rows) if rows else None
        return self._parts[key]

    @cached_property
    def _rows_by_datapoint(self) -> list[list[int]]:
        """For each pack, the datapoint of each row."""
        found = []
        for step_pack in self.packs:
            owners = [-1] * step_pack.pack.input_ids.shape[0]
            pairs = zip(step_pack.pack.row.tolist(), step_pack.pack.pair.tolist(), strict=True)
            for row, pair in pairs:
                owners[row] = self.spec.completions[pair].datapoint
            found.append(owners)
        return found

    def _part(self, step_pack: StepPack, rows: list[int]) -> tuple[StepPack, Tensor]:
        index = torch.tensor(rows, device=step_pack.slots.device)
        pack = step_pack.pack.selected(index)
        order = TokenOrder.of(pack, self.spec.completions, step_pack.order.share.dtype)
        return StepPack(pack, step_pack.slots[index], step_pack.everywhere, order), index


def _row_tokens(completions: Sequence[Completion], groups: Sequence[Hashable]) -> int:
    """Length of the longest prompt tree: rows are that long anyway, and shorter trees that fill them cost nothing more.

    Longer rows would be slower: attention is paid for between trees that don't see each other.
    """
    sizes: dict[Hashable, int] = {}
    longest = 1
    for completion, group in zip(completions, groups, strict=True):
        prompt, key = len(completion.prompt), (group, completion.prompt)
        sizes[key] = sizes.get(key, prompt) + len(completion.ids) - 1
        longest = max(longest, prompt + len(completion.ids) - 1, min(sizes[key], TREE_PROMPTS * prompt))
    return longest
