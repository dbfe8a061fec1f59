"""The tensors that a static step is over: what the rows bring, their keys and values, their edits, and its graphs."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from .graphs import Graphs
from .slot_steering import SlotSteering
from .slots import SlotCache

__all__ = ["StaticStep", "bucket", "sight_mask"]


def bucket(n: int, fewest: int = 1) -> int:
    """The smallest of 1, 2, 4, 8, 16, 24, 32, 48, 64, 96, … that is at least ``n`` and ``fewest``."""
    n = max(n, fewest)
    power = 1 << (n - 1).bit_length()
    return power * 3 // 4 if power > 16 and n <= power * 3 // 4 else power


def sight_mask(back: Tensor, form: str, window: int | None, dtype: torch.dtype) -> Tensor | dict[str, Tensor]:
    """What a model takes as its mask.

    Args:
        back: [rows, new, columns] int64, how far back each column stands; negative where it isn't seen.
        form: how the model takes masks, one of :data:`mechanex.engine.pack.TREES`.
        window: of its layers that have one, or None.
        dtype: the model's.
    """
    lowest = torch.finfo(dtype).min
    hidden = back[:, None] < 0

    def mask(hidden: Tensor) -> Tensor:
        return torch.zeros(hidden.shape, dtype=dtype, device=back.device).masked_fill_(hidden, lowest)

    if form == "plain":
        return mask(hidden)
    narrow = mask(hidden | (back[:, None] >= window)) if window is not None else mask(hidden)
    return narrow if form == "window" else {"full_attention": mask(hidden), "sliding_attention": narrow}


class StaticStep:
    """The tensors that a step is over. It holds nothing of the model, and outlives decoders.

    A row may bring several columns, say the tokens of a draft, or alternatives at one position.

    Args:
        cache: without rows.
        steering: of the rows.
        device: of the model.
        most_new: columns that a row may bring.

    Attributes:
        ids: [rows, most_new] int64 new tokens.
        lengths: [rows] int64 tokens of each row before them.
        moves: [rows] int64, how much longer a step makes a row: 0 for slots that only fill up the bucket.
        offsets: [rows, most_new] int64, positions of the new columns, counted from the row's length; 0, 1, 2, …
        own: [rows, most_new, most_new] bool, which of the row's new columns (last axis) each of them sees; those up to
            itself.
    """

    def __init__(
        self, cache: SlotCache, steering: SlotSteering, device: torch.device, most_new: int = 1
    ) -> None:
        self.cache, self.steering, self.most_new = cache, steering, most_new
        self.graphs = Graphs(device)
        self.model_state: Hashable = None
        """What of the model the captured steps depend on."""
        self._device = device
        self.reserve(0, 0)

    @property
    def n_bytes(self) -> int:
        """Memory that it takes."""
        return self.cache.n_bytes + self.steering.n_bytes

    def reserve(self, rows: int, columns: int, like: Any = None) -> None:
        """Makes room for this many rows of this many columns.

        Args:
            rows, columns: at least as many as there are.
            like: a cache of the model, the first time.
        """
        self.graphs.clear()
        if rows:
            self.cache.reserve(rows, columns, like)
        new, device = self.most_new, self._device
        self.ids = torch.zeros(rows, new, dtype=torch.long, device=device)
        self._state = torch.zeros(2, rows, dtype=torch.long, device=device)
        self.lengths, self.moves = self._state[0], self._state[1]
        self.offsets = torch.arange(new, device=device).repeat(rows, 1)
        self.own = torch.ones(new, new, dtype=torch.bool, device=device).tril().repeat(rows, 1, 1)

    def lay_out(self, lengths: Sequence[int]) -> None:
        """Says how many tokens the rows have before the step."""
        state = torch.zeros(self._state.shape, dtype=torch.long)
        state[0, : len(lengths)], state[1, : len(lengths)] = torch.tensor(lengths), 1
        # Only CUDA is known to keep pinned memory until its copy is done.
        on_gpu = self._state.is_cuda
        self._state.copy_(state.pin_memory() if on_gpu else state, non_blocking=on_gpu)

    def show(self, rows: int, columns: int, new: int = 1) -> tuple[Tensor, Tensor, Tensor]:
        """Readies the cache for a call over some of the slots and columns.

        Returns:
            The call's ids and positions [rows, new] int64, and [rows, new, columns] int64, how many positions before
            each of its tokens another one stands that it sees; negative for one that it doesn't see.
        """
        lengths = self.lengths[:rows, None]
        index = lengths + torch.arange(new, device=lengths.device)
        positions = lengths + self.offsets[:rows, :new]
        self.cache.show(rows, columns, index)
        column = torch.arange(columns, device=lengths.device).expand(rows, columns)
        if new == 1:
            return self.ids[:rows, :1], positions, (positions - column)[:, None]
        place = column - lengths
        among = place.clamp(0, new - 1)
        # A new column stands where its offset says, an old one at its own index.
        at = torch.where(place >= 0, positions.gather(1, among), column)
        seen = self.own[:rows, :new, :new].gather(2, among[:, None].expand(rows, new, columns))
        seen = torch.where((place >= 0)[:, None], seen & (place < new)[:, None], True)
        back = positions[:, :, None] - at[:, None]
        return self.ids[:rows, :new], positions, torch.where(seen, back, -1)

    def move(self, rows: int) -> None:
        """Says that each row has its new token."""
        self.lengths[:rows] += self.moves[:rows]
