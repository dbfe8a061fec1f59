"""Processes that share one job, as torchrun starts them: packs are dealt to them, and all of them get the whole result.

Nothing is to be configured: where ``torchrun`` or ``accelerate launch`` has started several processes, each calls the
same functions with the same arguments. In one process nothing of torch.distributed is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..errors import MechanexError
from ..launched import global_rank
from .pack import Pack
from .pauses import pause

__all__ = ["SINGLE", "Ranks", "alone", "current_ranks", "dealt"]

_T = TypeVar("_T")


@dataclass(frozen=True)
class Ranks:
    """The processes of a job, and which of them this one is.

    Args:
        rank: of this process, from 0.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    def share(self, sizes: Sequence[int]) -> list[int]:
        """Which of some pieces of work are this process's, in order: the same deal in every process.

        Args:
            sizes: of each piece, such as its tokens; the largest are dealt first, to whoever has least.
        """
        loads, found = [0] * self.size, []
        for piece in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
            to = min(range(self.size), key=lambda rank: (loads[rank], rank))
            loads[to] += sizes[piece]
            if to == self.rank:
                found.append(piece)
        return sorted(found)

    def total(self, tensor: Tensor) -> Tensor:
        """The sum of every process's tensor of this shape, the same bits in all of them.

        Sums are in float64 and in the order of the ranks.
        """
        if self.size == 1:
            return tensor
        import torch.distributed as dist

        mine = tensor.detach().to("cpu", torch.float64).contiguous()
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(parts, mine)
        return torch.stack(parts).sum(0).to(tensor)

    def gathered(self, given: _T) -> list[_T]:
        """What every process gives, by rank; anything that can be pickled."""
        if self.size == 1:
            return [given]
        import torch.distributed as dist

        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, given)
        return found

    def from_first(self, make: Callable[[], _T]) -> _T:
        """What the first process makes, in all of them; the others make nothing."""
        if self.size == 1:
            return make()
        with self.together():
            made = make() if self.rank == 0 else None
        import torch.distributed as dist

        box = [made]
        dist.broadcast_object_list(box, src=0)
        found: Any = box[0]
        return found  # type: ignore[no-any-return]

    @contextmanager
    def together(self) -> Iterator[None]:
        """Runs a block that fails in all processes where it fails in one, so that none waits for it in vain.

        Raises:
            MechanexError: it failed in another process; says which, and how.
        """
        if self.size == 1:
            yield
            return
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        told = self.gathered(None if failure is None else f"{type(failure).__name__}: {failure}")
        if failure is not None:
            raise failure
        for rank, text in enumerate(told):
            if text is not None:
                raise MechanexError(
                    f"process {rank} of {self.size} failed, and this one stops with it: {text}"
                )


SINGLE = Ranks()
_alone: ContextVar[bool] = ContextVar("mechanex_alone", default=False)


@contextmanager
def alone() -> Iterator[None]:
    """Runs a block in this process by itself, whatever others there are: for what only some of them do."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def current_ranks() -> Ranks:
    """The processes that a call made now is shared by; the first call joins them."""
    if _alone.get() or global_rank() is None:
        return SINGLE
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    return Ranks(dist.get_rank(), dist.get_world_size())


def dealt(packs: Sequence[Pack], ranks: Ranks, desc: str, *, progress: bool = False) -> Iterator[Pack]:
    """This process's packs, with a pause for others before each.

    Args:
        packs: of all processes.
        ranks: the processes.
        desc: what the progress bar says.
        progress: show one, in the first process.
    """
    mine = [packs[i] for i in ranks.share([pack.input_ids.numel() for pack in packs])]
    for pack in tqdm(mine, desc=desc, unit="batch", disable=not progress or ranks.rank > 0):
        pause()
        yield pack
